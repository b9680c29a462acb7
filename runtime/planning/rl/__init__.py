"""How to split devices between rollouts and training (docs/rl_planning.md): what is asked, the play, the search.

    load.py           what is generated: groups of answers, in turns
    replica.py        answers at work, from event to event; `engine_prices.py` what an engine's steps take there
    play.py           generation and training beside one another, paced as `glm5 rl` is; `played.py` what comes of it
    question.py       what is asked
    sides.py          what either side can be on so many devices, and closed forms of its rate
    search.py         which split; `answer.py` the document of it

`play.py` and what it imports know seconds, and not how anyone came by them.
"""
