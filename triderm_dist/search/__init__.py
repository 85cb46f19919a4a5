"""Search for settings: a space, trials that train as `triderm train` does, and what came out of them.

    OUTPUT/search/search.yaml, space.yaml   what is searched, as it was started
    OUTPUT/search/trial-001/                a run of its own: trial.json and MODEL/fold-K; trial 1 has the experiment's
                                            own settings, the baseline
    OUTPUT/search/trials.csv                one row a trial
    OUTPUT/search/ray/                      Ray Tune's state, from which a killed search goes on
    OUTPUT/best.yaml                        the experiment with the best settings

Ray decides what runs where and when it stops; all that is told about a trial is in its folder.
"""
