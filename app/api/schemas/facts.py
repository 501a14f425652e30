"""Facts as callers write them, in our format and in EasyEdit's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import (
    AliasChoices,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from app.api.schemas.base import Prompt, Request, ShortText, as_list, as_prompt
from app.domain import (
    SUBJECT_SLOT,
    Expectation,
    Fact,
)


class ExpectationIn(Request):
    """A prompt and the continuation expected of it; without ``answer``: as before the edit."""

    prompt: Prompt
    answer: ShortText | None = None

    def to_domain(self) -> Expectation:
        return Expectation(self.prompt, self.answer)


class EasyEditProbe(Request):
    """EasyEdit's column form: prompts, and their answers in the same order."""

    prompt: Annotated[
        list[Prompt], BeforeValidator(as_list, json_schema_input_type=Prompt | list[Prompt])
    ] = Field(min_length=1, max_length=256)
    ground_truth: Annotated[
        list[
            Annotated[
                list[ShortText],
                BeforeValidator(as_list, json_schema_input_type=ShortText | list[ShortText]),
                Field(min_length=1, max_length=256),
            ]
        ]
        | None,
        BeforeValidator(
            lambda value: None if value is None else as_list(value),
            json_schema_input_type=ShortText | list[ShortText | list[ShortText]] | None,
        ),
    ] = None

    @model_validator(mode="after")
    def _pair(self) -> Self:
        answers = self.ground_truth
        if answers is not None and len(self.prompt) > 1 and len(answers) != len(self.prompt):
            raise ValueError(
                f"{len(self.prompt)} prompts but {len(answers)} ground truths; give one for each"
            )
        return self

    def to_domain(self) -> list[Expectation]:
        """Where several answers count as right, the first one is taken."""
        if self.ground_truth is None:
            return [Expectation(prompt) for prompt in self.prompt]
        pairs = zip(self.prompt, self.ground_truth, strict=False)
        return [Expectation(prompt, answers[0]) for prompt, answers in pairs]


def _accept_target_new(schema: dict[str, Any]) -> None:
    """Document EasyEdit's name for ``target``, and that one of the two is needed."""
    properties = schema["properties"]
    properties["target_new"] = {**properties["target"], "title": "Target New"}
    schema["required"] = [name for name in schema["required"] if name != "target"]
    schema["oneOf"] = [{"required": ["target"]}, {"required": ["target_new"]}]


Texts = Annotated[
    list[Prompt],
    BeforeValidator(as_list, json_schema_input_type=Prompt | list[Prompt]),
    Field(max_length=256),
]
Expectations = Annotated[
    list[Annotated[ExpectationIn, BeforeValidator(as_prompt, json_schema_input_type=Prompt | Any)]],
    Field(max_length=256),
]
Probes = Annotated[
    dict[
        str,
        Annotated[
            list[EasyEditProbe],
            BeforeValidator(as_list, json_schema_input_type=EasyEditProbe | list[EasyEditProbe]),
        ],
    ],
    Field(max_length=64),
]


class FactIn(Request):
    """One thing the model should say from now on. ``{}`` stands for the subject in every
    prompt. EasyEdit's request format is accepted as it is: ``target_new``,
    ``rephrase_prompt``, ``locality`` and ``portability``."""

    model_config = ConfigDict(
        json_schema_extra=_accept_target_new,
        title="Fact",
    )

    prompt: Prompt = Field(
        description="With `{}` where the subject stands, or containing the subject itself.",
        examples=["The capital of {} is"],
    )
    subject: str = Field(
        max_length=1_024, description="The entity the fact is about.", examples=["France"]
    )
    target: str = Field(
        max_length=4_096,
        validation_alias=AliasChoices("target", "target_new"),
        description="What the model should say next, without a leading space.",
        examples=["Rome"],
    )
    ground_truth: ShortText | None = Field(default=None, description="What was true before.")
    rephrase_prompts: Texts = Field(
        default_factory=list, description="Other ways to ask, measured after the edit."
    )
    rephrase_prompt: Texts = Field(
        default_factory=list, description="EasyEdit's name for `rephrase_prompts`."
    )
    locality_prompts: Expectations = Field(
        default_factory=list, description="Prompts whose answer must not change."
    )
    locality: Probes = Field(default_factory=dict, description="EasyEdit's locality columns.")
    portability_prompts: Expectations = Field(
        default_factory=list, description="Prompts whose answer follows from the new fact."
    )
    portability: Probes = Field(default_factory=dict, description="EasyEdit's portability columns.")

    def to_domain(self) -> Fact:
        return Fact(
            prompt=self.prompt,
            subject=self.subject,
            target=self.target,
            ground_truth=self.ground_truth,
            rephrase_prompts=tuple(
                self._fill(prompt) for prompt in (*self.rephrase_prompts, *self.rephrase_prompt)
            ),
            locality=self._expectations(self.locality_prompts, self.locality),
            portability=self._expectations(self.portability_prompts, self.portability),
        )

    def _fill(self, prompt: str) -> str:
        return prompt.replace(SUBJECT_SLOT, self.subject)

    def _expectations(
        self, own: Iterable[ExpectationIn], columns: Mapping[str, list[EasyEditProbe]]
    ) -> tuple[Expectation, ...]:
        given = [item.to_domain() for item in own]
        probes = [probe for column in columns.values() for probe in column]
        given += [item for probe in probes for item in probe.to_domain()]
        return tuple(replace(item, prompt=self._fill(item.prompt)) for item in given)
