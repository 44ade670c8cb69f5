"""Logs in, a record out: tables, submission.json, figures, the reviewers' checks, the page of
coloured text, and the folder for records/.

All numbers come from the logs that train_gpt.py writes; a person gives only names and a date. Same
logs in, same bytes out. What cannot be true (NaN, a loss that is a bpb, seeds of different code,
...) is refused in one line that names the file and the line. Losses are nats per token, bpb bits
per byte, sizes bytes (1 MB = 1,000,000).
"""

# The rooms; each imports only from rooms above it.
#   log      what a line of a log says, with its units     colors   of the page and the figures
#   run      one finished run, checked; the limits         fill     templates, by Jinja2
#   folder   the parts of a submission folder, its pages
#   tables   README, docs/, submission.json                probe    what only running it tells
#   figures  PNGs of the logs' numbers                     view/    the scored text as a page
#   compare  runs beside each other
#   checks   what a reviewer would look at
#   copy     the folder for records/
