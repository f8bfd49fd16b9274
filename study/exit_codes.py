"""All exit codes of the command `study`; a worker process ends with the same ones."""

from __future__ import annotations

OK = 0
UNEXPECTED = 1
BAD_INPUT = 2
TRIALS_FAILED = 3
STOPPED = 4
BUDGET_SPENT = 5
DATABASE_UNAVAILABLE = 75
INTERRUPTED = 130

MEANINGS = {
    OK: "done; for a study: every trial has finished, or search.target or search.patience ended it",
    UNEXPECTED: "an unexpected error; its log file is named",
    BAD_INPUT: "bad input: one line names the rule, the value and the fix",
    TRIALS_FAILED: "the study has finished, but more trials failed than --allow-failures permits, or all of them",
    STOPPED: "stopped by `study stop`; `study resume` continues",
    BUDGET_SPENT: "the budget is spent; `study resume --budget …` continues",
    DATABASE_UNAVAILABLE: "the database was unavailable for too long (EX_TEMPFAIL); the same command continues later",
    INTERRUPTED: "interrupted by a signal; the same command continues",
}
