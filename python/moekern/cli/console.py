"""Where the commands print their tables."""

import rich.console


class Console(rich.console.Console):
    """rich's, which ends the program with code 1 when the reader has left (`moekern demo | head -1`): main decides."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError
