"""English wordings of every topic: `{s}` is the subject, `{y}` the year.

The first aspect of a topic opens a conversation and names its subject; the later ones are follow-up questions. The
test wordings of an aspect are never used in a train file (`tests/data/test_mini_news.py` checks it).
"""

from __future__ import annotations

Wordings = tuple[list[str], list[str]]

SUBJECTS: dict[str, str] = {
    "mayor": "{n}",
    "budget": "the {n} Council",
    "export": "{n} Province",
    "cup": "the {n} Cup",
    "festival": "the {n} Festival",
    "fire": "{n} Mill",
    "talks": "the {n} border dispute",
    "robbery": "the {n} Museum",
    "dig": "the {n} Institute",
    "film": "the film {n}",
    "bridge": "the {n} Viaduct",
    "strike": "{n} Railways",
}

WORDINGS: dict[str, list[Wordings]] = {
    "mayor": [
        (
            [
                "Who was the mayor of {s} in {y}?",
                "In {y}, who led the city of {s} as mayor?",
                "Name the person who was mayor of {s} in {y}.",
                "Which mayor governed {s} during {y}?",
            ],
            ["Who held the office of mayor in {s} in {y}?", "Tell me who ran {s} as its mayor in {y}."],
        ),
        (
            [
                "What did the mayor promise that year?",
                "And what was promised to the voters?",
                "Which promise was made in {s}?",
            ],
            ["What pledge did the mayor of {s} give?"],
        ),
    ],
    "budget": [
        (
            [
                "What did {s} spend most on in {y}?",
                "In {y}, what was the largest budget item of {s}?",
                "Which purchase cost {s} the most in {y}?",
                "Name the biggest expense of {s} in {y}.",
            ],
            ["Where did most of the {y} budget of {s} go?", "On what did {s} use most of its money in {y}?"],
        ),
    ],
    "export": [
        (
            [
                "What was the main export of {s} in {y}?",
                "In {y}, which goods did {s} sell abroad the most?",
                "Name the top export of {s} in {y}.",
                "What did {s} mostly ship to other lands in {y}?",
            ],
            ["Which product led the exports of {s} in {y}?", "What did {s} export above all in {y}?"],
        ),
        (
            ["Where were they sold?", "And which place bought most of it?", "Who was the main buyer from {s}?"],
            ["To which place did most of these goods go?"],
        ),
    ],
    "cup": [
        (
            [
                "Which club won {s} in {y}?",
                "Who were the winners of {s} in {y}?",
                "In {y}, which team took {s} home?",
                "Name the club that lifted {s} in {y}.",
            ],
            ["Which team became champion of {s} in {y}?", "Who triumphed in {s} in {y}?"],
        ),
        (
            ["Who scored the winning goal?", "And who decided the final?", "Which player scored last in {s}?"],
            ["Whose goal settled the match?"],
        ),
    ],
    "festival": [
        (
            [
                "What was the theme of {s} in {y}?",
                "In {y}, what was {s} about?",
                "Which motto did {s} choose in {y}?",
                "Name the theme that {s} had in {y}.",
            ],
            ["Under which theme was {s} held in {y}?", "What topic did {s} celebrate in {y}?"],
        ),
        (
            ["Who opened it?", "And who gave the opening speech?", "Which guest opened {s}?"],
            ["Who was the guest that started the event?"],
        ),
    ],
    "fire": [
        (
            [
                "What caused the {y} fire at {s}?",
                "What set {s} on fire?",
                "Name the cause of the fire at {s} in {y}.",
                "Why did {s} burn in {y}?",
            ],
            ["How did the blaze at {s} start?", "What was to blame for the fire at {s} in {y}?"],
        ),
        (
            [
                "Who led the rescue?",
                "And who was in charge of the rescue team?",
                "Which officer saved the workers of {s}?",
            ],
            ["Under whose command were the people saved?"],
        ),
        (
            ["Where were the workers taken?", "And where did they sleep that night?", "Which shelter took them in?"],
            ["To what place were the people moved?"],
        ),
    ],
    "talks": [
        (
            [
                "Where were the {y} peace talks on {s} held?",
                "Which place hosted the talks on {s}?",
                "In {y}, where did both sides of {s} meet?",
                "Name the place where {s} was settled in {y}.",
            ],
            ["At which location did the negotiators discuss {s}?", "Where did the talks about {s} take place in {y}?"],
        ),
        (
            ["What did the two sides exchange?", "And what was handed over?", "Which gift ended {s}?"],
            ["What was given as a sign of peace?"],
        ),
    ],
    "robbery": [
        (
            [
                "What was stolen from {s} in {y}?",
                "What did thieves take from {s}?",
                "In {y}, what disappeared from {s}?",
                "Name the loot of the {y} robbery at {s}.",
            ],
            ["What went missing at {s} in {y}?", "Which items did the robbers carry out of {s}?"],
        ),
        (
            [
                "Where was the loot found?",
                "And where did the police find it?",
                "Which hiding place was used after {s} was robbed?",
            ],
            ["At what place did it turn up again?"],
        ),
    ],
    "dig": [
        (
            [
                "What did {s} discover in {y}?",
                "Which find did {s} report in {y}?",
                "In {y}, what did the researchers of {s} find?",
                "Name the {y} discovery of {s}.",
            ],
            ["What was unearthed by {s} in {y}?", "Which discovery made {s} famous in {y}?"],
        ),
        (
            ["Who led the expedition?", "And who was the head of the team?", "Which scientist worked for {s}?"],
            ["Who directed the research?"],
        ),
    ],
    "film": [
        (
            [
                "What is {s} from {y} about?",
                "Which story does {s} tell?",
                "In {y}, what did {s} show?",
                "Name the main subject of {s}, shown in {y}.",
            ],
            ["What does the plot of {s} deal with?", "What can viewers see in {s} of {y}?"],
        ),
        (
            ["Who played the hero?", "And who had the leading role?", "Which actor became known by {s}?"],
            ["Who was the star of it?"],
        ),
    ],
    "bridge": [
        (
            [
                "Why was {s} closed in {y}?",
                "What blocked {s} in {y}?",
                "What kept the traffic off {s}?",
                "Name the reason for the {y} closure of {s}.",
            ],
            ["What forced the closing of {s}?", "What stood in the way on {s} in {y}?"],
        ),
    ],
    "strike": [
        (
            [
                "What did the strikers at {s} demand in {y}?",
                "What was the {y} strike at {s} for?",
                "Name the demand of the workers of {s}.",
                "In {y}, what did the staff of {s} ask for?",
            ],
            ["For what did the workers of {s} go on strike?", "What did the union want from {s} in {y}?"],
        ),
        (
            ["Who led the strike?", "And who spoke for the workers?", "Which leader talked to {s}?"],
            ["Who was the voice of the union?"],
        ),
        (
            ["Where did it end?", "And where was the deal signed?", "Which place saw the end of the strike?"],
            ["At which place was the agreement reached?"],
        ),
    ],
}
