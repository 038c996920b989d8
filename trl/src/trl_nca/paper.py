"""The paper that the losses are from."""

TITLE = "Noise Contrastive Alignment of Language Models with Explicit Rewards"
ARXIV = "2402.05369"
CITATION = f"""@inproceedings{{chen2024noise,
    title  = {{{{{TITLE}}}}},
    author = {{Huayu Chen and Guande He and Lifan Yuan and Ganqu Cui and Hang Su and Jun Zhu}},
    year   = 2024,
    url    = {{https://arxiv.org/abs/{ARXIV}}},
}}"""
