"""Hyperparameter search: a space, trials that train as `triderm train` does, and their results.

    OUTPUT/search/search.yaml, space.yaml   settings and space, as the search was started
    OUTPUT/search/trial-001/                the run of one trial: trial.json and MODEL/fold-K; trial 1, the baseline,
                                            has the experiment's own settings
    OUTPUT/search/trials.csv                one row per trial
    OUTPUT/search/ray/                      Ray Tune's state, from which an interrupted search resumes
    OUTPUT/best.yaml                        the experiment with the best settings

Ray decides where a trial runs and when it stops; the state and scores of a trial are in its folder.
"""
