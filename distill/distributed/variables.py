"""Read integer environment variables of torchrun or Slurm."""

from __future__ import annotations

from collections.abc import Mapping

from distill.errors import UserError


def integer(
    variables: Mapping[str, str],
    name: str,
    least: int,
    most: int | None = None,
    default: str = "",
    fix: str = "start the program with torchrun or srun, or unset the variable",
) -> int:
    """Return the environment variable ``name`` as an integer in ``least``..``most``, else raise UserError.

    ``variables`` maps names of environment variables to values. ``most``: None means no maximum. ``default``: text used
    if the variable is missing. ``fix``: the error's advice to the user.
    """
    text = variables.get(name, default)
    if text.isdecimal() and least <= int(text) and (most is None or int(text) <= most):
        return int(text)
    allowed = f"at least {least}" if most is None else f"in {least}..{most}"
    raise UserError(f"environment variable {name}={text} is not an integer {allowed}", fix, key=name, value=text)
