"""The exercise of lesson 0: a small one, to see how exercises work."""

from course.lessons import Exercise

TITLE = "Install, and a first run"
NEEDS = ()
EXERCISES = (
    Exercise(
        "size",
        "tinyfm/common/units.py",
        1,
        'Compare n with 10e6 and with 2**30. The formats ".3g", ".0f" and ".2f" of an f-string '
        "round a number.",
    ),
)
