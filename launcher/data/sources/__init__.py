"""Reading what the user has: files of many kinds, folders, patterns, URLs and data sets of the hub, as rows with their
places.

A row's place is `file:line`, the line that it begins on, or `file:N` for row N of a table. A row that cannot be used
is a DataError in its place, and reading goes on; a file that is broken raises one.
"""

from launcher.data.sources.files import contents, local_files
from launcher.data.sources.fingerprint import Fingerprint, fingerprint
from launcher.data.sources.hub import pinned
from launcher.data.sources.pieces import Piece, pieces, read, read_all
from launcher.data.sources.ranges import File, Row, Span

__all__ = [
    "File",
    "Fingerprint",
    "Piece",
    "Row",
    "Span",
    "contents",
    "fingerprint",
    "local_files",
    "pieces",
    "pinned",
    "read",
    "read_all",
]
