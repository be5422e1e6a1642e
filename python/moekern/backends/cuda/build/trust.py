"""Whether another user could have written a file, or could put another one in its place.

The machine code in a cache runs with the rights of the user who loads it. So a file is trusted only if it, its folder
and every folder above belong to the user or to root, and nobody else may write to them. A folder above may be writable
by all if it is sticky, as `/tmp` is: there only its owner may rename an entry. A symbolic link on the path counts as an
entry of its own. A group without other members (the usual group of a person on Linux) may write.
"""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path

MOST_LINKS = 40  # on one path, as in Linux


@lru_cache(maxsize=64)
def _only_member(group: int, user: int) -> bool:
    """Whether the group is the user's own: it has their name, is their first one and has no other members."""
    import grp
    import pwd

    try:
        person, members = pwd.getpwuid(user), grp.getgrgid(group)
    except KeyError:
        return False
    named_alike = group == person.pw_gid and members.gr_name == person.pw_name
    return user != 0 and named_alike and set(members.gr_mem) <= {person.pw_name}


def distrust(path: Path | str, state: os.stat_result, above: bool = False) -> str | None:
    """Why others could change the entry with this state, or None; `above`: a sticky folder protects its entries."""
    if not hasattr(os, "geteuid"):
        return None
    me = os.geteuid()
    if state.st_uid not in (0, me):
        return f"{path} belongs to user {state.st_uid}, not to user {me} or root"
    if stat.S_ISLNK(state.st_mode):  # the mode of a link means nothing
        return None
    if above and state.st_mode & stat.S_ISVTX:
        return None
    others = state.st_mode & stat.S_IWOTH
    group = state.st_mode & stat.S_IWGRP and not (state.st_uid == me and _only_member(state.st_gid, me))
    if others or group:
        return f"{path} is writable by other users (mode {stat.S_IMODE(state.st_mode):04o})"
    return None


def distrust_folder(folder: Path) -> str | None:
    """Why others could change a folder's contents, or None: by the folder, those above it or the links between.

    Entries that do not exist or cannot be reached are ignored. The path must be absolute.
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
        except OSError:  # nothing can be read there either
            return None
        # The last one is the folder itself: even in a sticky one, users who may write can add files.
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
