"""GPU kernels and their plain PyTorch references: one package per op.

``<op>/__init__.py`` is the checked public function, ``<op>/ref.py`` the truth, ``<op>/triton.py`` the Triton kernel,
imported when a CUDA tensor first reaches the op. ``registry.py`` registers ops with PyTorch, ``launch.py`` holds the
host side and ``triton.py`` the device side of what all kernels share, ``tuning.py`` their tile sizes.
"""
