"""Whether another user could have written a file, or could put another one in its place.

What lies in a cache of machine code runs with the rights of whoever loads it. So a file counts only if it, its folder
and every folder above belong to the user or to root, and nobody else may write to them. A folder above may be writable
by all if it is sticky, as `/tmp` is: there only its owner may rename an entry. A symbolic link on the way counts as an
entry of its own. A group that holds nobody but the user (the usual group of a person on Linux) may write.
"""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path

MOST_LINKS = 40  # on one path, as in Linux


@lru_cache(maxsize=64)
def _only_member(group: int, user: int) -> bool:
    """Whether the group is the user's own: it bears their name, is their first one and lists no one else."""
    import grp
    import pwd

    try:
        person, members = pwd.getpwuid(user), grp.getgrgid(group)
    except KeyError:
        return False
    named_alike = group == person.pw_gid and members.gr_name == person.pw_name
    return user != 0 and named_alike and set(members.gr_mem) <= {person.pw_name}


def distrust(path: Path | str, state: os.stat_result, above: bool = False) -> str | None:
    """Why others could change what has this state, or None; `above`: a sticky folder protects what lies in it."""
    if not hasattr(os, "geteuid"):
        return None
    me = os.geteuid()
    if state.st_uid not in (0, me):
        return f"{path} belongs to user {state.st_uid}, not to user {me} or root"
    if stat.S_ISLNK(state.st_mode):  # its mode means nothing
        return None
    if above and state.st_mode & stat.S_ISVTX:
        return None
    others = state.st_mode & stat.S_IWOTH
    group = state.st_mode & stat.S_IWGRP and not (state.st_uid == me and _only_member(state.st_gid, me))
    if others or group:
        return f"{path} is writable by other users (mode {stat.S_IMODE(state.st_mode):04o})"
    return None


def distrust_folder(folder: Path) -> str | None:
    """Why others could change what lies in a folder, or None: the folder, those above it and the links between.

    What does not exist or cannot be reached is not counted. The path must be absolute.
    """
    rest = list(reversed(folder.parts))
    here = Path(rest.pop())
    reason = distrust(here, here.lstat(), above=bool(rest))
    links = 0
    while rest and reason is None:
        part = rest.pop()
        if part == "..":
            here = here.parent
            continue
        try:
            state = (here / part).lstat()
        except OSError:  # nor can anything be read there
            return None
        # The last one is the folder itself: sticky or not, who may write there may add files.
        reason = distrust(here / part, state, above=bool(rest))
        if not stat.S_ISLNK(state.st_mode):
            here /= part
            continue
        links += 1
        if links > MOST_LINKS:
            return f"{folder} leads through more than {MOST_LINKS} symbolic links"
        target = Path(os.readlink(here / part))
        if target.is_absolute():
            here = Path(target.anchor)
        rest += reversed(target.parts[1:] if target.is_absolute() else target.parts)
    return reason
