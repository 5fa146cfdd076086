"""The embedded default: chained word problems that a small model learns in front of the user.

`problems` makes them, `writer` writes (careful and careless) demonstrations and the data files,
`verifier` holds the rewards, `tokenizer` the tokenizer and the size of the model. Everything is
written in the formats that a user's own data has; nothing here trains or samples.
"""
