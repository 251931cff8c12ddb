"""The door, through the official client."""

USER = {"role": "user", "content": "hi"}


async def test_a_chat_is_answered_and_recorded(enter):
    async with enter() as house:
        session, client = house.open()
        async with client:
            house.says = ["hello<|im_end|>"]
            answer = await client.chat.completions.create(model="policy", messages=[USER])
        (choice,) = answer.choices
        assert (choice.message.content, choice.finish_reason) == ("hello", "stop")
        (sample,) = session.samples()
        prompt = house.tokens("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
        said = house.tokens("hello<|im_end|>")
        assert sample.token_ids.tolist() == prompt + said
        assert sample.loss_mask.tolist() == [0] * len(prompt) + [1] * len(said)
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.completion_tokens == len(said)


async def test_a_stream_says_what_the_whole_answer_says(enter):
    async with enter() as house:
        session, client = house.open()
        house.says = ["héllo wörld, " * 4 + "<|im_end|>"]
        async with client:
            stream = await client.chat.completions.create(
                model="policy", messages=[USER], stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "héllo wörld, " * 4
        assert len(chunks) > 5, "it came in pieces"
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert chunks[-1].usage.completion_tokens == session.samples()[0].loss_mask.sum()
