"""The derivation in pictures: `python -m examples.figures`.

planes.py     seven losses with embeddings of two numbers, trained on digits and on ten glyphs: plane and circle
curves.py     the target's logit over the angle, margin by margin and branch by branch
hinges.py     from the sum of hinges to softplus, step by step; what happens to the gradient as classes are added
training.py   data, networks and the training loop of all of them
"""
