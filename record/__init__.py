"""Logs in, a record out: tables, submission.json, figures, the reviewers' checks, the page of
coloured text, and the folder for records/. `python -m record --help`.

All numbers come from the logs that train_gpt.py writes; a person gives only names and a date. Same
logs in, same bytes out. What cannot be true (NaN, a loss that is a bpb, seeds of different code,
...) is refused in one line that names the file and the line. Losses are nats per token, bpb bits
per byte, sizes bytes (1 MB = 1,000,000).

    log      what a line of a log says            folder   the parts of a submission folder
    run      one finished run, checked            tables   README, docs, submission.json
    probe    what only running the script tells   checks   what a reviewer would look at
    figures  PNGs of the logs' numbers            view     the scored text as a page
    copy     the folder for records/              fill     templates

Each imports only from rooms to its left or above it.
"""
