"""What the static pass knows: the lattice of values, and which names of PyTorch give which."""

from __future__ import annotations

import enum


class Value(enum.Enum):
    """What an expression may be. UNKNOWN is everything that the source does not tell."""

    TENSOR = "tensor"
    MASK = "bool tensor"
    HOST = "host value"
    UNKNOWN = "unknown"

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor for sure."""
        return self in (Value.TENSOR, Value.MASK)


def join(first: Value, second: Value) -> Value:
    """The value of an expression that is one of two."""
    if first is second:
        return first
    if first.is_tensor and second.is_tensor:
        return Value.TENSOR
    return Value.UNKNOWN


#: Attributes that are host metadata, whatever they are asked of.
HOST_ATTRIBUTES = frozenset(
    [
        "shape",
        "dtype",
        "device",
        "ndim",
        "is_cuda",
        "requires_grad",
        "layout",
        "itemsize",
        "is_leaf",
        "names",
        "grad_fn",
        "training",
        "config",
        "is_cpu",
        "is_sparse",
        "is_quantized",
        "is_meta",
        "nbytes",
    ]
)
#: Attributes of a tensor that are tensors.
TENSOR_ATTRIBUTES = frozenset(["T", "mT", "H", "mH", "grad", "data", "real", "imag", "values", "indices"])
#: Methods that answer from metadata.
HOST_METHODS = frozenset(
    [
        "size",
        "dim",
        "numel",
        "nelement",
        "stride",
        "is_contiguous",
        "element_size",
        "is_floating_point",
        "is_complex",
        "get_device",
        "storage_offset",
        "ndimension",
        "type",
        "__len__",
        "is_pinned",
    ]
)
#: Methods that make the host wait, with their rule.
SYNC_METHODS = {
    "item": "D2H_SYNC", "tolist": "D2H_SYNC", "numpy": "D2H_SYNC", "cpu": "D2H_SYNC", "is_nonzero": "D2H_SYNC",
    "equal": "D2H_SYNC", "allclose": "D2H_SYNC", "nonzero": "DYNAMIC_SHAPE", "masked_select": "DYNAMIC_SHAPE",
    "unique": "DYNAMIC_SHAPE", "unique_consecutive": "DYNAMIC_SHAPE", "bincount": "DYNAMIC_SHAPE",
    "argwhere": "DYNAMIC_SHAPE", "data_ptr": "DATA_PTR",
}  # fmt: skip
#: Of those, names that hardly anything but a tensor has.
TELLING_METHODS = frozenset(["item", "tolist", "nonzero", "masked_select"])
#: Functions of torch that make the host wait, with their rule and whether they answer with a host value.
SYNC_FUNCTIONS = {
    "nonzero": "DYNAMIC_SHAPE", "unique": "DYNAMIC_SHAPE", "unique_consecutive": "DYNAMIC_SHAPE",
    "masked_select": "DYNAMIC_SHAPE", "bincount": "DYNAMIC_SHAPE", "argwhere": "DYNAMIC_SHAPE",
    "equal": "D2H_SYNC", "allclose": "D2H_SYNC", "is_nonzero": "D2H_SYNC",
}  # fmt: skip
HOST_ANSWERS = frozenset(["item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "data_ptr"])
LINALG_CHECKS = frozenset(["inv", "solve", "eig", "eigvals", "svd", "cholesky", "eigh", "lstsq", "matrix_exp"])
#: Functions and methods that give a bool tensor.
MASK_MAKERS = frozenset(
    [
        "isfinite",
        "isnan",
        "isinf",
        "any",
        "all",
        "logical_and",
        "logical_or",
        "logical_not",
        "logical_xor",
        "greater",
        "less",
        "eq",
        "ne",
        "gt",
        "lt",
        "ge",
        "le",
        "isin",
        "isclose",
    ]
)
FACTORIES = frozenset(
    [
        "zeros",
        "ones",
        "empty",
        "full",
        "arange",
        "linspace",
        "randn",
        "rand",
        "randint",
        "eye",
        "tril_indices",
        "triu_indices",
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "randn_like",
        "rand_like",
        "tril",
        "triu",
    ]
)
UPLOADS = frozenset(["tensor", "as_tensor", "from_numpy", "asarray"])
#: torch.<name>… that are no tensor functions.
NOT_TENSORS = (
    "torch.cuda", "torch.is_", "torch.get", "torch.set_", "torch.device", "torch.finfo", "torch.iinfo", "torch.jit",
    "torch.compiler", "torch._check", "torch.distributed", "torch.no_grad", "torch.inference_mode", "torch.enable_grad",
    "torch.autocast", "torch.amp", "torch.backends", "torch.Size", "torch.Generator", "torch.dtype", "torch.utils",
    "torch.nn.Module", "torch.nn.Parameter", "torch._dynamo", "torch.fx", "torch.onnx", "torch.load", "torch.save",
    "torch.library", "torch.ops", "torch.accelerator", "torch.version", "torch.profiler", "torch._C", "torch.hub",
)  # fmt: skip
#: Methods that mark an unannotated parameter as a tensor.
TENSOR_METHODS = frozenset(
    [
        "view",
        "reshape",
        "to",
        "float",
        "half",
        "bfloat16",
        "sum",
        "mean",
        "softmax",
        "log_softmax",
        "transpose",
        "permute",
        "contiguous",
        "clone",
        "unsqueeze",
        "squeeze",
        "expand",
        "matmul",
        "mul",
        "add",
        "sub",
        "div",
        "pow",
        "exp",
        "sin",
        "cos",
        "abs",
        "max",
        "min",
        "argmax",
        "topk",
        "sort",
        "gather",
        "scatter",
        "index_copy_",
        "index_add_",
        "index_select",
        "masked_fill",
        "masked_fill_",
        "cumsum",
        "flatten",
        "chunk",
        "repeat",
        "repeat_interleave",
        "type_as",
        "detach",
        "sigmoid",
        "tanh",
        "fill_",
        "copy_",
        "mul_",
        "add_",
        "square",
        "norm",
        "long",
        "int",
        "bool",
        "new_zeros",
        "new_ones",
        "new_empty",
        "expand_as",
        "roll",
        "clamp",
        "clamp_",
        "zero_",
        "unbind",
        "cuda",
        "view_as",
        "masked_select",
        "nonzero",
        "item",
        "tolist",
        "any",
        "all",
        "index_put_",
        "bmm",
        "mm",
        "split",
        "histc",
    ]
)
#: Builtins that read the value of a tensor.
READING_BUILTINS = frozenset(
    [
        "bool",
        "int",
        "float",
        "complex",
        "range",
        "print",
        "str",
        "repr",
        "round",
        "hash",
        "max",
        "min",
        "sorted",
        "any",
        "all",
    ]
)
ITERATING_BUILTINS = frozenset(["max", "min", "sorted", "any", "all"])
ASKING_BUILTINS = frozenset(["len", "isinstance", "hasattr", "getattr", "type", "id", "callable", "issubclass"])
