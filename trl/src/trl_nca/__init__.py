"""What NCA adds to TRL: losses over K scored responses, and the log-prob engine under them.

In the order in which rows meet the files: `columns` takes them, `responses` makes token ids of texts, by `rendering`
(chat templates), `splitting` (prompt and responses) and `fitting` (lengths), `sampler` orders rows, `collate` packs
them into a batch with its `layout`, `chunks` cuts the batch to the memory there is, `logps` runs it through a model
that is patched by `shared_prompt` (attention; `sharing` says for which models, `flash` by which kernels), `rotary`,
`head` (with its `cross_entropy`), `layers`, `norms` and `one_pass` (by `kernels`), once `self_check` has held the
result against the model's own; `router` balances the experts of a mixture.
`adapter_reference` gives a policy the reference's weights, and `reference` keeps the reference's log-probs on disk.
`losses` and `metrics` take log-probs and know no model.

Around the step: `config` has the settings, `step_metrics` gathers metrics, `checkpoints` writes checkpoints whole,
`preemption` stops on SIGTERM, `nonfinite` skips steps that are not finite, `distributed`, `code_hash` and `paper` are
small helpers, `stops` knows the tokens at which sampling stops, and `portable` makes saved folders readable elsewhere.
"""
