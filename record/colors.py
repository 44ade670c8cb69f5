"""The colours of the page and of the figures. Blue means saved, orange lost: told apart by every
kind of colour vision, and losses are underlined besides. Text on each of them keeps a contrast of
at least 4.5 (tested). A ramp's `transparent` is the bare page."""

THEMES = {
    "light": dict(
        **dict(paper="#fbfaf7", card="#ffffff", ink="#1c1b19", soft="#5f5c57", line="#e2dfd8"),
        **dict(saved="#1f6fb5", lost="#ad5406", mark="#1c1b19", plain="#8d8a84"),
    ),
    "dark": dict(
        **dict(paper="#141517", card="#1c1e21", ink="#ebe9e4", soft="#a5a29b", line="#313338"),
        **dict(saved="#6db1ee", lost="#f0a04b", mark="#ebe9e4", plain="#77767a"),
    ),
}
RAMPS = {  # theme -> ramp -> one colour per bin
    "light": dict(
        gain="#e0802d #ea9a52 #f2b47c #f7cca4 #fae0c8 #fcf0e3 transparent "
        "#ebf2f9 #d8e6f5 #bfd8f0 #a1c6ea #7fb0e0 #5c9cd6",
        cost="transparent #eeeaf6 #e0d9f0 #cfc4e8 #bfb1e0 #b09fd9 #a592d3 #9b87cd #927dc8",
    ),
    "dark": dict(
        gain="#9a5206 #834a0e #6d4012 #573515 #412a17 #2c2118 transparent "
        "#19232d #1a2e3f #1b3a54 #1c476a #1e5583 #1f639c",
        cost="transparent #221f2e #2a253b #332c48 #3d3457 #473c68 #52457a #5b4c8a #635397",
    ),
}
