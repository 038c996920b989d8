"""Checks a run before its first step: what would end it later, or would have no effect.

In the order in which a run meets them: `limits` holds the rows against the model's embeddings and positions,
`best_model` looks for the metric that tells the best checkpoint, and `no_effect` names the keys that do nothing.
"""
