"""The HTTP API: text, chats, tools and schemas in front of a `Service` that knows token ids alone.

Nouns, from the ground up (a file each; what is named later may import what is named before):

    refusal     what is told to a client, and with which status; dialects put it into their own shape
    vocabulary  a checkpoint's text: tokenizer, template, which tokens are markup, the bytes of each
    events      what is told of an answer: thought, said, call begun, grown and ended
    stops       text up to the first of several strings, however it is cut
    schemas     which types a value may have, by its JSON Schema
    arguments   the text of one call's arguments -> the JSON of them, as it comes
    reader      tokens -> events: the one state machine for thinking, text and calls
    tools       what may be called, and with which arguments
    grammar     schemas and tools -> compiled grammars (llguidance), in a bounded cache
    grammar_trial  the process in which each is compiled first
    guide       `Constraint` of an answer: free thoughts, a budget of them, then what a grammar allows
    synthetic   tokens without a model, that a guide allows and that end in time
    ask         what any dialect asks for, in one form; its prompt and jobs
    endpoint    what is served: service, vocabulary, limits, metrics, whether it is ready
    answer      jobs on the service -> events by choice, on the event loop; aborted when nobody listens
    dialects/   chat, completions, responses, messages: a body -> an ask; events -> one object, or a stream of them
    guard       around all of it: keys, sizes, times, request ids
    app         routes;  server: sockets, signals, draining;  backing: from options to a `Service`

A request: guard -> a dialect reads the body (through foundation/reading.py, on a worker thread) into an `Ask` -> its
prompt is rendered and encoded and its schemas compiled, still before anything is answered -> `Service.submit` ->
updates come on the service's thread and are handed to the loop in batches -> `Reader` -> events -> the dialect writes.
Streamed and whole answers are made of the same events, so they cannot differ. Whatever ends a request early (a client
that is gone, a stop string, an error) aborts its jobs in one place (`answer`).

Nothing here schedules, knows a model's shapes, or waits on the event loop's thread.
"""
