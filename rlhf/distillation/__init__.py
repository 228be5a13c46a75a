"""Distillation: a student learns a teacher's distribution, token by token."""

from rlhf.distillation.alignment import Spans, align, first_tokens, token_pieces
from rlhf.distillation.config import DistillConfig
from rlhf.distillation.student import copy_layers, fresh_student, matched_layers, spread_layers
from rlhf.distillation.teacher_file import TeacherFile, create_teacher_file, open_teacher_file
from rlhf.distillation.trainer import DistillTrainer

__all__ = [
    "DistillConfig",
    "DistillTrainer",
    "Spans",
    "TeacherFile",
    "align",
    "copy_layers",
    "create_teacher_file",
    "first_tokens",
    "fresh_student",
    "matched_layers",
    "open_teacher_file",
    "spread_layers",
    "token_pieces",
]
