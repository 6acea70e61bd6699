"""The exceptions nybble raises, and the exit code each one becomes.

    NybbleError               1
      CheckpointError         1   a file is not what a checkpoint may be
      FormatError             1   numbers that a format cannot hold
      RecipeError             1   a recipe, or what it asks for, makes no sense here
      ModelError              1   an architecture nybble does not know, or a tensor nobody claims
        UnreadableValue       1   a key of config.json holds what no model can have there
      KernelUnavailable       1   the kernel asked for cannot run on this machine
      MissingExtra            1   a library that this command needs is not installed
      TextError               1   a tokenizer, chat template or text that cannot be used
      EngineError             1   a forward pass that must not go on
        ContextTooLong        1   more tokens than the model or the cache holds
        OutOfPages            1   the page pool is exhausted
      EvaluationError         1   figures that must not be compared, or cannot be computed
      ServeError              1   an address or a file of keys that a server must not start with
      CheckFailed             3   what was written is not what was planned
      DoesNotFit              4   not enough disk or memory; nothing was started

A message says what is wrong, where (file, tensor, key), what was expected and found, and what to
do.
"""

from __future__ import annotations


class NybbleError(Exception):
    """Base of every error that nybble raises on purpose."""

    exit_code = 1


class CheckpointError(NybbleError):
    """A checkpoint folder or file breaks a rule of its format."""


class FormatError(NybbleError):
    """Values that cannot be represented in the number format asked for."""


class RecipeError(NybbleError):
    """A recipe is malformed, matches nothing, or asks for what the layout or the data cannot
    give."""


class ModelError(NybbleError):
    """An unknown model type, or a tensor that no rule of its family claims."""


class UnreadableValue(ModelError):
    """A key of config.json is there, with a value of a type or sign that nothing can read."""


class KernelUnavailable(NybbleError):
    """A kernel or instruction set was asked for by name and cannot run here."""


class MissingExtra(NybbleError):
    """A library of an extra is needed and not installed; the message names the extra."""


class TextError(NybbleError):
    """A tokenizer, chat template or text that cannot be used as asked."""


class EngineError(NybbleError):
    """A forward pass that must not go on: NaN activations, a state in the wrong place."""


class ContextTooLong(EngineError):
    """More tokens than the model's context, or the cache made for them, holds."""


class OutOfPages(EngineError):
    """The page pool has no page left for what was asked."""


class Busy(EngineError):
    """The engine's queue is full; `retry_after_s` is when there may be room, a guess in seconds."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EvaluationError(NybbleError):
    """Figures that cannot be computed, or whose conditions forbid comparing them."""


class ServeError(NybbleError):
    """An address that cannot or must not be listened on, or a file of keys that cannot be used."""


class CheckFailed(NybbleError):
    """A written checkpoint does not agree with its plan."""

    exit_code = 3


class DoesNotFit(NybbleError):
    """The machine has too little disk or memory for what was asked; nothing was written."""

    exit_code = 4
