"""NVRTC in a process of its own, run as a script: reads jobs on standard input, writes cubins on standard output.

Within a process NVRTC compiles one program at a time, with any number of threads. The script needs the standard library
alone, so that it starts in about 20 ms; its argument is the path of the NVRTC library. Messages are pickles: first the
library's version; then a (cubin, log) for every (name, text, options), with an error message as a string for the cubin
if it failed.
"""

import ctypes
import glob
import os
import pickle
import sys


def open_builtins(path: str) -> None:
    """Open the second half of an NVRTC library, which NVRTC itself opens by its name alone.

    The wheel of 13.0 does not say where it is, so the file next to the library is opened here, and NVRTC finds it
    loaded. Toolkits keep theirs where the dynamic linker looks.
    """
    for builtins in glob.glob(os.path.join(os.path.dirname(path), "libnvrtc-builtins.so.*")):
        ctypes.CDLL(builtins, ctypes.RTLD_GLOBAL)


class Library:
    """The few functions of NVRTC that are needed."""

    def __init__(self, path: str):
        """Open the library."""
        self._library = ctypes.CDLL(path)
        open_builtins(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments: object) -> int:
        return int(getattr(self._library, name)(*arguments))

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        if self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size)):
            return b""
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def version(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def compile(self, name: str, text: str, options: "tuple[str, ...]") -> "tuple[bytes | str, str]":
        """The cubin and the log of a program, or an error message and the log."""
        program = ctypes.c_void_p()
        result = self._call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        if result == 0:
            strings = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            result = self._call("nvrtcCompileProgram", program, len(options), strings)
        log = self._text(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        cubin: bytes | str = self._text(program, "CUBIN") if result == 0 else self._error(result)
        self._call("nvrtcDestroyProgram", ctypes.byref(program))
        return cubin, log

    def _error(self, result: int) -> str:
        return f"{self._library.nvrtcGetErrorString(result).decode()} ({result})"


def main() -> None:
    """Serve jobs until standard input ends, or nobody reads the answers."""
    # Text that the library prints must not come between the messages.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    library = Library(sys.argv[1])

    def send(message: object) -> None:
        answers.write(pickle.dumps(message))
        answers.flush()

    try:
        send(library.version())
        while True:
            name, text, options = pickle.load(sys.stdin.buffer)
            send(library.compile(name, text, options))
    except (EOFError, pickle.UnpicklingError, BrokenPipeError):  # the parent has ended, maybe within a message
        os._exit(0)  # at once: flushing text that cannot be sent would raise


if __name__ == "__main__":
    main()
