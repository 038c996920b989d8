"""Reward data: from files of any known form to token ids, with a named rule for each bad row.

The files meet the data in this order: `sources` opens files, folders and Hub data sets, `text_files` and `tables` read
raw rows of them, `columns` renames columns where the recipe says so, `formats` reads a row by one of its `forms`
(`ultrafeedback` scores of aspects), `messages` reads messages (`written` those that are text, `tools` their calls),
`conversations` parts them into prompt and answers, `records` joins rows of one response each, `cleaning` drops or fixes
bad rows by the table in `rules` (`turns` looks at their order, `texts` at all texts), `groups` chooses responses and
makes pairs, `reading` does all that piece by piece into a cache (`stored`), `load` mixes and splits, `outcomes` counts
what became of each row, `prepare` tokenizes, and `report` describes what is left: `lengths` and scores, the `targets`
that a loss makes of them, the `weights` of the rows, and the `notes` on what was not read. `row` has what they share.
`convert` writes rows to a file in place of training on them.
"""
