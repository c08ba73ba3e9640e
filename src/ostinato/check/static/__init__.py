"""The static pass: what the source alone says, without running it."""

from ostinato.check.static.scan import scan_file, scan_source
from ostinato.check.static.tree import scan_paths

__all__ = ["scan_file", "scan_paths", "scan_source"]
