"""All ways of training by their verb: a new one is a task here, and a trainer of its name in ``trainers``."""

from preftune.training.task import Task
from preftune.training.tasks.answers import AnswerTask
from preftune.training.tasks.pairs import PairTask
from preftune.training.tasks.reference_free import ContrastTask, OddsRatioTask
from preftune.training.tasks.texts import TextTask

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (TextTask, PairTask, AnswerTask, OddsRatioTask, ContrastTask)
}

__all__ = ["TASKS", "AnswerTask", "ContrastTask", "OddsRatioTask", "PairTask", "TextTask"]
