"""nybble: four-bit LLM checkpoints, end to end. Public names are loaded on first use; nothing runs
at import."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # for type checkers and editors; the table below is what runs
    from nybble.api.check import Checked as Checked
    from nybble.api.check import check as check_checkpoint  # noqa: F401
    from nybble.api.completion import Completion as Completion
    from nybble.api.convert import Converted as Converted
    from nybble.api.convert import convert as convert_checkpoint  # noqa: F401
    from nybble.api.convert import from_gguf as convert_from_gguf  # noqa: F401
    from nybble.api.convert import to_gguf as convert_to_gguf  # noqa: F401
    from nybble.api.diff import Difference as Difference
    from nybble.api.diff import diff as diff_checkpoints  # noqa: F401
    from nybble.api.doctor import Environment as Environment
    from nybble.api.doctor import doctor as describe_machine  # noqa: F401
    from nybble.api.evaluate import Protocol as Protocol
    from nybble.api.evaluate import evaluate as evaluate_checkpoint  # noqa: F401
    from nybble.api.evaluate import perplexity as measure_perplexity  # noqa: F401
    from nybble.api.evaluate import reference as make_reference  # noqa: F401
    from nybble.api.generate import generate as generate_text  # noqa: F401
    from nybble.api.inspect import Inspection as Inspection
    from nybble.api.inspect import inspect as inspect_checkpoint  # noqa: F401
    from nybble.api.llm import LLM as LLM
    from nybble.api.plan import plan as plan_checkpoint  # noqa: F401
    from nybble.api.quantize import Result as Result
    from nybble.api.quantize import quantize as quantize_checkpoint  # noqa: F401
    from nybble.api.repair import Repaired as Repaired
    from nybble.api.repair import repair as repair_checkpoint  # noqa: F401
    from nybble.api.repair import undo as undo_repair  # noqa: F401
    from nybble.engine.request import Grammar as Grammar
    from nybble.engine.request import SamplingParams as SamplingParams
    from nybble.errors import CheckFailed as CheckFailed
    from nybble.errors import CheckpointError as CheckpointError
    from nybble.errors import ContextTooLong as ContextTooLong
    from nybble.errors import DoesNotFit as DoesNotFit
    from nybble.errors import EngineError as EngineError
    from nybble.errors import EvaluationError as EvaluationError
    from nybble.errors import FormatError as FormatError
    from nybble.errors import KernelUnavailable as KernelUnavailable
    from nybble.errors import MissingExtra as MissingExtra
    from nybble.errors import ModelError as ModelError
    from nybble.errors import NybbleError as NybbleError
    from nybble.errors import OutOfPages as OutOfPages
    from nybble.errors import RecipeError as RecipeError
    from nybble.errors import TextError as TextError
    from nybble.plan.plan import Plan as Plan

# Public name -> module and name there. The functions are not called `plan` or `quantize` here,
# because packages are.
_WHERE = {
    "plan_checkpoint": ("nybble.api.plan", "plan"),
    "quantize_checkpoint": ("nybble.api.quantize", "quantize"),
    "check_checkpoint": ("nybble.api.check", "check"),
    "repair_checkpoint": ("nybble.api.repair", "repair"),
    "undo_repair": ("nybble.api.repair", "undo"),
    "convert_checkpoint": ("nybble.api.convert", "convert"),
    "convert_to_gguf": ("nybble.api.convert", "to_gguf"),
    "convert_from_gguf": ("nybble.api.convert", "from_gguf"),
    "Checked": ("nybble.api.check", "Checked"),
    "Repaired": ("nybble.api.repair", "Repaired"),
    "Converted": ("nybble.api.convert", "Converted"),
    "inspect_checkpoint": ("nybble.api.inspect", "inspect"),
    "diff_checkpoints": ("nybble.api.diff", "diff"),
    "measure_perplexity": ("nybble.api.evaluate", "perplexity"),
    "evaluate_checkpoint": ("nybble.api.evaluate", "evaluate"),
    "make_reference": ("nybble.api.evaluate", "reference"),
    "generate_text": ("nybble.api.generate", "generate"),
    "LLM": ("nybble.api.llm", "LLM"),
    "SamplingParams": ("nybble.engine.request", "SamplingParams"),
    "Grammar": ("nybble.engine.request", "Grammar"),
    "Completion": ("nybble.api.completion", "Completion"),
    "Protocol": ("nybble.api.evaluate", "Protocol"),
    "describe_machine": ("nybble.api.doctor", "doctor"),
    "Plan": ("nybble.plan.plan", "Plan"),
    "Result": ("nybble.api.quantize", "Result"),
    "Inspection": ("nybble.api.inspect", "Inspection"),
    "Difference": ("nybble.api.diff", "Difference"),
    "Environment": ("nybble.api.doctor", "Environment"),
    "NybbleError": ("nybble.errors", "NybbleError"),
    "CheckpointError": ("nybble.errors", "CheckpointError"),
    "FormatError": ("nybble.errors", "FormatError"),
    "RecipeError": ("nybble.errors", "RecipeError"),
    "ModelError": ("nybble.errors", "ModelError"),
    "KernelUnavailable": ("nybble.errors", "KernelUnavailable"),
    "CheckFailed": ("nybble.errors", "CheckFailed"),
    "DoesNotFit": ("nybble.errors", "DoesNotFit"),
    "MissingExtra": ("nybble.errors", "MissingExtra"),
    "TextError": ("nybble.errors", "TextError"),
    "EngineError": ("nybble.errors", "EngineError"),
    "ContextTooLong": ("nybble.errors", "ContextTooLong"),
    "OutOfPages": ("nybble.errors", "OutOfPages"),
    "EvaluationError": ("nybble.errors", "EvaluationError"),
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> object:
    if name in _WHERE:
        module, attribute = _WHERE[name]
        value = getattr(import_module(module), attribute)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'nybble' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
