"""Reports on runs: tables, figures, one HTML page, a model card.

The files meet the data in this order: `runs` reads a run's output folder, `tables` and `figures` show its numbers,
`html` puts both into `report.html`, `callback` writes that at each evaluation, `card` writes the model card, and
`console` says on the terminal what is logged and what to do next.
"""
