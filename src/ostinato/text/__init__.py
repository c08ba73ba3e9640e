"""Text on one side, token ids on the other: tokenizer, streaming detokenizer, chat template, stop strings.

Nothing here imports PyTorch, so a command that only needs token ids starts at once.
"""

from __future__ import annotations

from ostinato.text.stop import StopStrings
from ostinato.text.stream import StreamDecoder
from ostinato.text.template import ChatTemplate
from ostinato.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "StopStrings", "StreamDecoder", "Tokenizer"]
