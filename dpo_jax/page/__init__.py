"""The page of a run, `report.html`: one file that shows what was trained, on what, and what came of it."""
