"""Evaluates a model: held-out scores around training, MT-bench, AlpacaEval, and their judges.

The files meet the data in this order: `held_out` samples and scores before and after training, and `length_control`
compares the scores at one length; `files` reads the benchmarks' questions and `answers` writes a model's answers;
`endpoint` asks a judge behind a URL, `judge` holds what the judges share, `judge_mt_bench` and `judge_alpaca_eval` are
the two benchmarks', and `judge_local` needs no URL.
"""
