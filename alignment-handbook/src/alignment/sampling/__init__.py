"""Samples responses from a model, scores them with functions or reward models, and talks to it.

The files meet the data in this order: `prompts` reads prompts, `sample` draws responses to a batch of them,
`sample_file` to a whole file, `kept` keeps those that later runs would draw again, `score` scores them by a
`reward_function` or a `reward_model`. `chat` is a conversation.
"""
