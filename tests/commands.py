"""Commands called in the process of a test; use them with the fixture ``leaves_by_raising``."""

from __future__ import annotations

from typing import Any

import typer
from typer.testing import CliRunner


class Commands:
    """The commands of an app, with words of any type."""

    def __init__(self, app: typer.Typer) -> None:
        self._app = app

    def call(self, *words: object) -> Any:
        """What came of a command."""
        return CliRunner().invoke(self._app, [str(word) for word in words])

    def done(self, *words: object) -> str:
        """The output of a command that succeeds."""
        result = self.call(*words)
        assert result.exit_code == 0, result.output
        return result.output

    def refused(self, *words: object, code: int = 1) -> str:
        """The line that a command ends with."""
        result = self.call(*words)
        assert result.exit_code == code, result.output
        assert result.stdout == "" and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        return result.stderr
