"""Search the settings of one model of an experiment, with Ray Tune.

triderm search --config EXPERIMENT.yaml space=losses trials=12 output=RUN

A trial trains as triderm train does, in RUN/search/TRIAL/, on the experiment's packed shards and a shared token cache.
`space=` is short for `search.space=`, and so on for all settings of the search. Writes RUN/search/trials.csv, and
RUN/best.yaml for --config of triderm train and triderm pipeline. An interrupted search resumes with resume=true.
"""

from triderm_dist.cli import run
from triderm_dist.commands import programs_using
from triderm_dist.search.settings import SearchRun


def main(config: SearchRun) -> None:
    from triderm_dist.search.results import print_summary
    from triderm_dist.search.study import search

    print_summary(search(config, log=lambda text: print(text, flush=True)))


def start() -> None:
    run(SearchRun, main, __doc__, users=programs_using, on_ranks=lambda config: False)


if __name__ == "__main__":
    start()
