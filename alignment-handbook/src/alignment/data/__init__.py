"""Reward data: from files of any known form to token ids, with a named rule for each bad row.

The files meet the data in this order: `sources` reads raw rows, `formats` recognises their form (`ultrafeedback` reads
one of them), `rules` drops or fixes bad ones, `groups` chooses responses and makes pairs, `reading` does all that piece
by piece into a cache, `load` mixes and splits sources, `prepare` tokenizes, and `report` describes what is left.
`row` has the words they share. `convert` writes rows to a file in place of training on them.
"""
