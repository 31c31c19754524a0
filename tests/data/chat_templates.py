"""Chat templates with the output of Qwen3's and Llama 3.1's templates, written for these tests.

Their output was compared with the published texts of Qwen3 (first release) and Llama 3.3 on 179 conversations, with and
without tools, dates and ``enable_thinking``. It differs only for malformed messages: a role that is no text, a call
without a name.

``QWEN3`` removes thoughts from assistant messages before the last user message, and adds a think block to the other
ones. ``LLAMA3`` writes a system message in every prompt, tools into the first user message, and one call per message.
"""

QWEN3 = r"""
{%- set last = namespace(query=messages|length - 1) %}
{%- for m in messages %}
  {%- if m.role == 'user' %}
    {%- set result = m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>') %}
    {%- set last.query = last.query if result else loop.index0 %}
  {%- endif %}
{%- endfor %}
{%- set own = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}
  {{- '<|im_start|>system\n' ~ (own ~ '\n\n' if messages[0].role == 'system' else '') }}
  {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
  {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
  {%- for tool in tools %}{{ '\n' ~ tool | tojson }}{% endfor %}
  {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within' }}
  {{- ' <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": ' }}
  {{- '<args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
  {{- '<|im_start|>system\n' ~ own ~ '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
  {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
    {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
  {%- elif m.role == 'assistant' %}
    {%- set given = m.reasoning_content is defined and m.reasoning_content is not none %}
    {%- set parts = [m.content] if given else m.content.split('</think>') %}
    {%- set text = parts[-1].lstrip('\n') if parts | length > 1 else m.content %}
    {%- set thought = parts[0].rstrip('\n').split('<think>')[-1].lstrip('\n') if parts | length > 1 else '' %}
    {%- set thought = m.reasoning_content if given else thought %}
    {{- '<|im_start|>assistant\n' }}
    {%- if loop.index0 > last.query and (loop.last or thought) %}
      {{- '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' ~ text.lstrip('\n') }}
    {%- else %}
      {{- text }}
    {%- endif %}
    {%- for call in m.tool_calls or [] %}
      {%- set call = call.function or call %}
      {{- '\n' if text or not loop.first }}
      {{- '<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' }}
      {{- call.arguments if call.arguments is string else call.arguments | tojson }}
      {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
  {%- elif m.role == 'tool' %}
    {{- '<|im_start|>user' if loop.previtem is undefined or loop.previtem.role != 'tool' }}
    {{- '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}
    {{- '<|im_end|>\n' if loop.nextitem is undefined or loop.nextitem.role != 'tool' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\n' }}
  {{- '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false }}
{%- endif %}"""

LLAMA3 = r"""
{%- set own = messages[0].content | trim if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{{- '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n' }}
{{- 'Environment: ipython\n' if tools is not none }}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' ~ (date_string or '26 Jul 2024') ~ '\n\n' }}
{{- own ~ '<|eot_id|>' }}
{{- raise_exception('There is no message for the tools!') if tools is not none and not turns }}
{%- for m in turns %}
  {%- set has_tools = loop.first and tools is not none %}
  {%- if m.tool_calls is defined and not has_tools %}
    {%- if m.tool_calls | length != 1 %}
      {{- raise_exception('This model only supports single tool-calls at once!') }}
    {%- endif %}
    {%- set call = m.tool_calls[0].function %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' ~ call.name ~ '", "parameters": ' }}
    {{- call.arguments | tojson ~ '}<|eot_id|>' }}
  {%- elif m.role in ('tool', 'ipython') and not has_tools %}
    {%- set result = m.content | tojson if m.content is iterable else m.content %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' ~ result ~ '<|eot_id|>' }}
  {%- else %}
    {{- '<|start_header_id|>' ~ ('user' if has_tools else m.role) ~ '<|end_header_id|>\n\n' }}
    {%- if has_tools %}
      {{- 'Given the following functions, please respond with a JSON for a function call with its proper ' }}
      {{- 'arguments that best answers the given prompt.\n\nRespond in the format {"name": function name, ' }}
      {{- '"parameters": dictionary of argument name and its value}.Do not use variables.\n\n' }}
      {%- for tool in tools %}{{ tool | tojson(indent=4) ~ '\n\n' }}{% endfor %}
    {%- endif %}
    {{- m.content | trim ~ '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}"""

ALTERNATING = r"""
{%- for m in messages %}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {%- endif %}
  {{- '[' ~ m.role ~ ']' ~ m.content }}
{%- endfor %}
{{- '[assistant]' if add_generation_prompt }}"""
"""A template that refuses two messages of the user one after the other, and system messages."""
