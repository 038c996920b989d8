"""`--plan`: what a run takes, in steps and memory, before the run is started.

A plan is made in this order: `steps` works out the batch and the number of steps, `meta_model` builds the model without
memory, `timeline` follows its tensors through a step that `trace` runs, `layouts` shards the memory over processes,
`estimate` does both for a recipe, `checkpointing` decides by it where the recipe says `auto`, `hours` estimates the
time, `compatibility` says what a launch cannot do, `check` holds the engine against the weights where they are at hand,
`describe` puts it into words, and `show` makes the plan, prints it and writes it down.
"""
