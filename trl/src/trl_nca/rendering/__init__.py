"""From the messages of a row to token ids, through the tokenizer's chat template, with nothing lost on the way.

In the order in which a row meets the files: `messages` cleans it, `renderer` runs the template, `written` says what a
rendering lacks, `answers` finds one turn of the assistant's in it and `turns` several, `splitting` cuts a row into
prompt and responses by these, and `encoding` makes token ids and masks of that.
"""
