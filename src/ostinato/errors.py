"""Every error that a user of Ostinato can meet.

OstinatoError                  one line: what was wrong, and what to do
├── UsageError                 an argument or option that cannot be meant (exit code 2)
│   ├── SamplingError          a sampling parameter out of its range
│   └── DeviceError            the device that was asked for is not there
├── ModelNotFoundError         MODEL is no file, directory, hub id or known name
├── DownloadError              a download failed, was cut short, or has the wrong checksum
├── ModelFileError             a file of the model cannot be used
│   ├── GGUFError              … a GGUF file: truncated, wrong magic, unknown type
│   ├── CheckpointError        … a Hugging Face directory: missing or extra tensors, a missing shard
│   └── TokenizerError         … its tokenizer or chat template
├── ConversionError            a model could not be converted: where to, or what is in the way
├── UnsupportedModelError      an architecture, or a setting of one, that no model file here implements
├── ContextLengthError         a prompt or request that is longer than the context
├── MemoryBudgetError          weights, KV and buffers do not fit; says what would
├── KernelError                an op was called with shapes, dtypes, devices or strides that it does not take
├── CaptureError               a callable cannot be captured, or its replay would not equal eager
│   ├── CaptureRefusedError    capture failed: the operation, its source line, the remedy
│   ├── ReplayMismatchError    replay and eager differ on fresh inputs
│   └── StaleInputError        a replay was asked for with inputs that the graph would not read
└── CheckError                 the checker could not run what it was asked to check
"""

from __future__ import annotations


class OstinatoError(Exception):
    """Root of the tree. ``str(error)`` is one line that says what was wrong and what to do."""

    exit_code = 2


class UsageError(OstinatoError):
    """An argument or option that cannot be meant."""


class SamplingError(UsageError):
    """A sampling parameter is out of its range."""


class DeviceError(UsageError):
    """The device that was asked for is not there."""


class ModelNotFoundError(OstinatoError):
    """MODEL is neither a file, a directory, a hub id nor a known name."""


class DownloadError(OstinatoError):
    """A download failed, was cut short, or does not have the expected checksum."""


class ModelFileError(OstinatoError):
    """A file of the model cannot be used."""


class GGUFError(ModelFileError):
    """A GGUF file is truncated, is not GGUF, or holds something that cannot be read."""


class CheckpointError(ModelFileError):
    """A Hugging Face directory lacks tensors or shards, or has tensors that the model does not know."""


class TokenizerError(ModelFileError):
    """The tokenizer or the chat template of a model cannot be used."""


class ConversionError(OstinatoError):
    """A model could not be converted: the destination, its disk, or what is left of another conversion."""


class UnsupportedModelError(OstinatoError):
    """No model file implements this architecture, or this setting of it."""


class ContextLengthError(OstinatoError):
    """A prompt, or prompt plus answer, is longer than the context."""


class MemoryBudgetError(OstinatoError):
    """Weights, KV and buffers do not fit into the memory of the device; the message says what would."""


class KernelError(OstinatoError):
    """An op was called with shapes, dtypes, devices or strides that it does not take."""


class CaptureError(OstinatoError):
    """A callable cannot be captured, or its replay would not equal eager."""


class CaptureRefusedError(CaptureError):
    """Capture failed; the message names the operation, the source line and the remedy."""


class ReplayMismatchError(CaptureError):
    """Replay and eager gave different results on the same fresh inputs."""


class StaleInputError(CaptureError):
    """A replay was asked for with inputs whose shape, dtype or address the graph would not read."""


class CheckError(OstinatoError):
    """The checker could not run what it was asked to check."""
