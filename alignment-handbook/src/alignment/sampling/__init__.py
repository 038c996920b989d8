"""Responses and their scores: sample a model, score with functions or reward models, talk to it.

The files meet the data in this order: `prompts` reads prompts, `sample` draws responses to a batch of them,
`sample_file` to a whole file, `score` scores them, with a `reward_model` if asked. `chat` is a conversation.
"""
