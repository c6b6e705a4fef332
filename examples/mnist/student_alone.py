"""The feed-forward student as it was trained on the labels alone: what distillation is held against."""

from dataclasses import replace
from pathlib import Path

from model import Student
from task import task as with_teacher

from edgebuild.task import Task, load_weights


def task() -> Task:
    student = load_weights(Student(), Path(__file__).with_name("student.safetensors"))
    return replace(with_teacher(), model=student, student=None)
