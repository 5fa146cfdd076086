"""The built-in task: chained word problems that a small model learns within minutes.

`problems` generates the problems, `writer` writes correct and incorrect demonstrations and the data
files, `verifier` has the reward functions, `tokenizer` the tokenizer and the size of the model. The
files have the formats of a user's own data; this package does not train or sample.
"""
