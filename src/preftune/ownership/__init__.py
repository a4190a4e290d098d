"""Who owns what in a folder: every run records what it writes, and replaces or removes nothing else.

A folder that preftune writes into holds ``.preftune``, with one folder per run named after the run's random id: its
record, and whatever is not finished yet. A file is a run's own if the run's record names it and its content is the one
that was written.
"""

from preftune.ownership.active_run import active, claim_files, may_put, put_json, put_text
from preftune.ownership.lock import holding
from preftune.ownership.path_conflicts import check_places
from preftune.ownership.record import HOME, Entry, Record, current, new_id, read_records
from preftune.ownership.run import ForeignFile, RunFolder

__all__ = [
    "HOME",
    "Entry",
    "ForeignFile",
    "Record",
    "RunFolder",
    "active",
    "check_places",
    "claim_files",
    "current",
    "holding",
    "may_put",
    "new_id",
    "put_json",
    "put_text",
    "read_records",
]
