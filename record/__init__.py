"""Logs in, a record out: tables, submission.json, figures, the reviewers' checks, the page of
coloured text, and the folder for records/.

All numbers come from the logs that train_gpt.py writes; a person gives only names and a date. Same
logs in, same bytes out. What cannot be true (NaN, a loss that is a bpb, seeds of different code,
...) is refused in one line that names the file and the line. Losses are nats per token, bpb bits
per byte, sizes bytes (1 MB = 1,000,000).
"""

# The rooms; each imports only from rooms above it.
#   log          what a line of a log says, with its units
#   consistency  what a log says twice must be the same      colors   of the page and the figures
#   run          one finished run, checked; the limits       fill     templates, by Jinja2
#   folder       the parts of a submission folder, its pages
#   tables       README, docs/                               probe    what only running it tells
#   submission   submission.json                             rescore  an artifact, scored again
#   stamp        which numbers a figure was drawn from       view/    the scored text as a page
#   figures      PNGs of the logs' numbers                   prose    figures in sentences
#   compare      runs beside each other                      git      what it would ignore
#   checks       what a reviewer would look at
#   copy         the folder for records/
#   and for folders that nobody here wrote, which are read and never run:
#   field_log       what a log of the field says          field_script  a look at a script
#   foreign_folder  files, runs and claims of a folder    foreign_verdict  how findings become one
#   foreign_logs    checks of the logs                    foreign_json     of submission.json
#   foreign_code    of the script, without running it     foreign          all checks, as they print
#   whose           which kind of folder it is, and whether its script may run
