"""NeuronRank's original form: the seed formula with tokens as groups; a neuron is active where its gate is open."""

from neuronrank_core.methods.neuronrank_tfidf import NeuronRankTfidf


class NeuronRankOld(NeuronRankTfidf):
    """The seed formula with token-level IDF."""

    name = "neuronrank_old"
    summary = "|W|^a * TF^b * IDF^c * spikiness^r, groups are tokens (open gates)"
    mode = "token"
    reads = NeuronRankTfidf.reads - {"tfidf_mode", "tfidf_k", "q_active", "tokens_per_document"}


METHOD = NeuronRankOld()
