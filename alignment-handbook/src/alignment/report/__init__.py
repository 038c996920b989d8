"""Reports on runs: tables, figures, one HTML page, a model card.

The files meet the data in this order: `environment` records what a run ran on, `runs` reads its output folder, `alarm`
watches the likelihood of the best responses, `groups` puts runs together that differ in their seed. `tables`, `numbers`
and `samples` show them as text; `axes`, `curves`, `data_figures` and `figures` draw them, and `svg` makes the drawings
fit a page. `html` puts all into `report.html`, `callback` writes that at each evaluation, `trackers` sends numbers to
experiment trackers, `card` writes the model card, and `console` says on the terminal what is logged and what to do
next.
"""
