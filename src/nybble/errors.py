"""The exceptions nybble raises, and the exit code each one becomes.

    NybbleError               1
      CheckpointError         1   a file is not what a checkpoint may be
      FormatError             1   numbers that a format cannot hold
      RecipeError             1   a recipe, or what it asks for, makes no sense here
      ModelError              1   an architecture nybble does not know, or a tensor nobody claims
      KernelUnavailable       1   the kernel asked for cannot run on this machine
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


class KernelUnavailable(NybbleError):
    """A kernel or instruction set was asked for by name and cannot run here."""


class CheckFailed(NybbleError):
    """A written checkpoint does not agree with its plan."""

    exit_code = 3


class DoesNotFit(NybbleError):
    """The machine has too little disk or memory for what was asked; nothing was written."""

    exit_code = 4
