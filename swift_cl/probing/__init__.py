"""Probing performance: what a stage's features still tell about each task, whatever its answers or its head say.

The weights of a stage are frozen, features of training rows are read, and fresh probes learn the classes from them
(`probes`); tested on the test rows they give a matrix P beside the observed one, R. P - R is the forgetting that does
not sit in the features. Source: Zheng, Qiu and Ma, arXiv 2312.07887. It is an analysis: it reads the training rows of
all tasks again, with scope `all` those of tasks that are not learned yet.
"""
