"""The console that the commands print tables on."""

import rich.console


class Console(rich.console.Console):
    """rich would end the program with code 1 when the reader has left (`moekern demo | head -1`); main decides that."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError
