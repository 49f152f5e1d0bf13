"""The embedded corpus: everyday dialogues written by this project, for training where no dataset can be downloaded.

    python support/builtin_corpus.py --split test --limit 3      # read a few dialogues

Every situation below is a small script: two speakers, A and B, walk through states, and the walk, the wording and the
slots (names, times, prices...) are drawn per dialogue. Later turns repeat slots said earlier and most acts follow from
the turn before, so a reply can largely, but never wholly, be told from its context. No text is copied from anywhere.

How to read (or add) a situation. First its slots, then one line per thing that somebody can say:

    drink drink2 = latte; green tea                   two different values out of one list
    price/total = three/five; four/seven              values that go together
    B order 4 One {drink}. | I'll make it. -> hub     when B is to speak in state "order": a commissive, said in one of
                                                      two ways; then A speaks, out of A's lines of the state "hub"
    A hub 3 No, a {drink2}. -> change drink=drink2    from here on, {drink} is what {drink2} was
    A hub 2 Where can I sit? -> hub close !place      A line is said once per dialogue, and of the lines that share a
                                                      !tag only one; two states after the arrow pool their lines

The first line opens the dialogue; the state `end` may end it. `close` is the state that starts the goodbye. The engine
draws a length per dialogue, and steers by it: no `close` early, no hub late. COMMON belongs to every situation; `*` is
both speakers. <words> stand for one of PHRASES. The digit is DailyDialog's dialogue act (ACTS), a letter after it the
emotion (EMOTIONS; no letter is none).

How the acts are told apart: asking for information is 2; asking for a deed or a thing, telling and suggesting is 3
("Could you...?", "Can I have...?", "Let's..."); accepting, refusing and promising is 4 ("Sure...", "Sorry, I can't",
"I'll...", "Let me..."); thanks, greetings and everything else is 1.
"""

from __future__ import annotations

import argparse
import functools
import random
import re
from typing import NamedTuple

CORPUS_VERSION = 1  # part of cache keys: raise it whenever a change makes generate_corpus() print something else
SPLIT_SIZES = {"train": 5000, "validation": 400, "test": 600}  # dialogues
MIN_TURNS, MAX_TURNS = 6, 12  # utterances in a dialogue
ACTS = {1: "inform", 2: "question", 3: "directive", 4: "commissive"}
EMOTIONS = {"": 0, "a": 1, "d": 2, "f": 3, "h": 4, "s": 5, "u": 6}  # anger, disgust, fear, happiness, sadness, surprise

PHRASES = {
    "sure": "Sure; Of course; No problem; Certainly",  # a service accepts
    "ok": "Okay; All right; Sure",  # anybody accepts
    "sorry": "Sorry; I'm sorry; I'm afraid not",  # anybody refuses
    "no": "No thanks; Thanks, but no",  # refuses an offer
    "thanks": "Thanks; Thank you; Thanks a lot",
    "hello": "Hello; Hi; Good morning; Good afternoon",
}

COMMON = """
day day2 = Monday; Tuesday; Wednesday; Thursday; Friday; Saturday; Sunday
time time2 = nine; ten; eleven; two; three; four; five; half past nine; half past two; half past four
name name2 = Anna; Ben; Clara; David; Emma; Frank; Grace; Henry; Julia; Leo; Maria; Nick; Rosa; Tom
few few2 = two; three; four; five; six; seven
mins = ten; fifteen; twenty; thirty; forty
price/cheap = thirty/twenty; forty/thirty; sixty/fifty; eighty/sixty; ninety/seventy; fifty/forty
* thanks  1h <thanks>, you've been very helpful. | <thanks> for your help. | Great, thank you so much! -> welcome end
* welcome 1h You're welcome. Have a nice day! | My pleasure. Goodbye! | You're welcome, goodbye! -> end
* obey    4 <ok>, I'll do that. | <ok>, I'll remember that. | <ok>, I will. -> leave end
* leave   1h Good. Have a nice day! | Great. Take care! -> end
* bye     1h Great, see you then! | Perfect, see you soon! | Wonderful, see you! -> seeyou end
* seeyou  1h See you, bye! | Bye, take care! | I look forward to it, bye! -> end
"""

SITUATIONS = """
== cafe
drink drink2 = latte; cappuccino; green tea; black coffee; hot chocolate; iced tea; lemonade
snack = muffin; croissant; bagel; cookie; cheese roll
cost/total = two/four; three/five; three/six; four/seven; five/eight; six/nine
B start 2 <hello>, what would you like to drink? | <hello>, what can I get for you today? -> order
A order 3 I'd like a {drink}, please. | Can I have a cup of {drink}, please? | A {drink} for me, please. -> order
B order 4 <sure>, one {drink} coming up in a minute. | <sure>, I'll make you a {drink} right now. -> hub
B order 2 Do you want it small or large? | Would you like a small or a large one? -> size
A size  1 Just a small {drink} today. | I want a large one, I'm very thirsty. -> change
A hub   2 How much is it altogether? | And how much is that? -> price
B price 1 It's {cost} dollars altogether. | That's {cost} dollars, with the tax. -> hub close
A hub   2 What do you have to eat this morning? | Do you have anything small to eat? -> eat
B eat   1 We have some fresh {snack}s on the counter today. | There are still some warm {snack}s left. -> eat
B eat   3 You should try a warm {snack} with your {drink}. | Try one of our {snack}s, they're fresh. -> eat
A eat   4 <ok>, I'll take a {snack} with the {drink}. | <ok>, then I'll have a {snack} too. -> took cost=total
A eat   4 <no>, I'm not hungry, I'll just have the {drink}. | <no>, I'll only take the {drink}. -> change
B took  1 With the {snack} it's {cost} dollars. | Together they are {cost} dollars. -> hub close
B took  4 <ok>, I'll put the {snack} on a plate. | <ok>, I'll add one {snack} to your order. -> hub close
A hub   3 Actually, can I have a {drink2} instead? | Could I get a {drink2} instead? -> change drink=drink2
B change 4 <sure>, I'll bring the {drink} to your table. | <sure>, a {drink} it is, I'll start on it. -> hub close
A hub   2 Where can I sit down with my {drink}? | Is there a free table for me? -> table
B table 1 There's a nice table over there by the window. | The little table by the door is still free. -> hub close
A hub   1a I've been waiting for {mins} minutes now! | It's been {mins} minutes and I still have no {drink}! -> wait
B wait  4 I'm so sorry, I'll bring your {drink} right away. | I'm so sorry, I'll hurry up. -> hub close
A close 3 Can I pay now, please? | Could you bring me the bill, please? -> pay
B pay   1 That makes {cost} dollars in all, thank you. | Here's the bill, it's {cost} dollars. -> pay
A pay   1 Here's {cost} dollars, keep the change. | Here you are, {cost} dollars. -> enjoy
A pay   2 Do you take cards, or only cash? | Is it possible to pay by card? -> card
B card  1 We take cards too, it's {cost} dollars. | A card is fine, it's {cost} dollars. -> thanks
B enjoy 1h Thank you. Enjoy your {drink}! | Thanks, enjoy the {drink}! -> end

== hotel
room = single; double; family
B start 2 Park Hotel, how can I help you? | Park Hotel, what can I do for you? -> book
A book  3 I'd like to book a {room} room, please. | Could I book a {room} room for {day}? -> book
A book  3 I'd like a {room} room from {day} for {few} nights. | Could I stay {few} nights from {day}? -> check
B book  2 How many nights will you stay? | For how many nights? -> nights
B book  4 <sure>, I'll look for a {room} room. | <sure>, let me check. -> nights
A nights 1 {few} nights, from {day}. | I'm staying {few} nights, from {day}. -> check
B check 1 We have a nice room with a view of the sea. | There's still one quiet room left on the top floor. -> hub
B check 4 <ok>, I'll book {few} nights from {day}. | <ok>, I'll hold a room for {few} nights. -> hub
A hub   2 How much is it for one night? | And what does the room cost per night? -> price
B price 1 It's {price} dollars a night, with all taxes. | The {room} room is {price} dollars a night. -> dear hub close
A dear  1u Oh, {price} dollars is a lot of money! | That's more than I wanted to pay! -> dear
B dear  3 You could take a smaller room for {cheap} dollars. | Try a smaller room, it's {cheap} dollars. -> cheap
A cheap 4 <ok>, I'll take the room for {cheap} dollars. | <ok>, I'll take the smaller one. -> noted price=cheap
A cheap 4 <no>, I'll pay {price} dollars. | <no>, I'll keep the first one. -> noted
B noted 4 <sure>, I'll write down {price} dollars a night. | <sure>, I'll book that room. -> hub close
A hub   2 Is breakfast included in the price? | Do I get breakfast in the morning? -> food
B food  1 Yes, breakfast is free, from seven to ten. | No, breakfast is {few2} dollars more. -> hub close
A hub   3 Could you make it {day2} instead? | Can I come on {day2} instead? -> moved day=day2
B moved 4 <sure>, I'll change it to {day}. | <sure>, {few} nights from {day} then. -> hub close
A hub   1 We'd arrive rather late in the day. | My plane lands late that day. -> late
B late  2 What time will you arrive? | When will you be here? -> arrive
A arrive 1 At {time}, or a little later. | Around {time}, if the traffic is good. -> arrive
B arrive 4 <ok>, I'll wait for you at {time}. | <ok>, somebody will be here at {time}. -> hub close
A close 1 Good, my name is {name}. | The name is {name}, by the way. -> done
B done  1 Thank you, {name}, your room is booked. | Everything is booked now, {name}, see you on {day}. -> thanks
B done  3 Please bring your passport on {day}, {name}. | Please call us if you're late, {name}. -> obey

== train
city city2 = London; Paris; Rome; Berlin; Vienna; Madrid
kind = one-way; return
B start 2 <hello>, where would you like to go? | <hello>, where are you going? -> to
A to    3 I'd like a ticket to {city}, please. | One ticket to {city} for today, please. -> kind
A to    1 I'm going to {city} to see my family. | I have to go to {city} today. -> kind
B kind  2 Do you need it one-way or return? | A one-way or a return ticket? -> kind
B kind  3 You should take the train at {time}. | Take the fast train at {time}. -> take !time
A take  4 <ok>, I'll take the train at {time}. | <ok>, I'll take that one. -> issue
A kind  1 A {kind} ticket, I think. | I only need a {kind} ticket to {city}. -> issue
B issue 4 <sure>, a {kind} ticket to {city} it is. | <sure>, I'll print your {kind} ticket to {city}. -> hub
B issue 1 A {kind} ticket is {price} dollars. | {kind} to {city} is {price} dollars. -> hub close !price
A hub   2 How much does the trip to {city} cost? | And how much is the ticket to {city}? -> price !price
B price 1 A trip to {city} costs {price} dollars. | The {kind} ticket is {price} dollars today. -> hub close
A hub   2 When does the train to {city} leave? | What time is the next train to {city}? -> time !time
B time  1 The train leaves at {time} today. | The next train to {city} is at {time}. -> later hub close
A later 3 Could you put me on the train at {time2}? | I'd like the train at {time2}, please. -> moved time=time2
B moved 4 <sure>, I'll put you on the train at {time}. | <sure>, the train at {time} then. -> hub close
A hub   2 Which platform do I have to go to? | Which platform does the train leave from? -> plat
B plat  1 The train leaves from platform {few}. | It's platform {few}, over there on the right. -> hub close
A hub   3 Could I have a seat by the window? | Can I have a window seat, please? -> seat
B seat  4 <sure>, I'll give you a window seat. | <sorry>, I can't, they are all taken. -> hub close
A hub   1f I'm afraid I'll miss the train. | I'm worried that I'm too late. -> miss
B miss  1 You still have {mins} minutes to get there. | The train to {city} waits, there's plenty of time. -> hub close
A close 1 Good, here's my card for the ticket. | Good, here's the money for the ticket to {city}. -> paid
B paid  1 Here's your ticket to {city}. | Thank you, here's your ticket. -> thanks
B paid  3 Please show this ticket on the train to {city}. | Please be on the platform five minutes early. -> obey

== doctor
pain = headache; sore throat; cough; stomach ache; fever; earache
drug = pills; drops; tablets
times = once; twice; three times
B start 2 <hello>, what's the matter with you? | <hello>, what's wrong with you today? -> pain
A pain  1s I have a terrible {pain}, doctor. | I've got a {pain} and I feel weak. -> ask look
B ask   2 How long have you had the {pain}? | When did it all start? -> since
A since 1 It started {few} days ago. | I've had it for {few} days now. -> look found
B look  3 Please open your mouth and say something. | Please sit down over there and breathe in. -> look
A look  4 <ok>, I'll try, but it hurts. | <ok>, I'll do my best, doctor. -> found
B found 1 It's nothing serious, you only need some rest. | I can see that it's only a cold. -> hub
B found 3 Take these {drug} {times} a day. | You should take {drug} {times} a day. -> drug !drug
A drug  4 <ok>, I'll take the {drug} {times} a day. | <ok>, I'll take them {times} a day. -> noted
A drug  2 How long should I take the {drug}? | For how many days? -> long
B long  1 You need the {drug} for {few2} days. | Only until {day}, not any longer. -> hub close
B noted 1h Good, then you'll feel much better on {day2}. | Very good, that will help against the {pain}. -> hub close
A hub   2 What else should I do about the {pain}? | What can I do at home to get better? -> advice
B advice 3 Drink a lot of water and go to bed early. | You should drink some hot tea with honey. -> rest
A hub   2 Can I go to work tomorrow? | Do I have to stay in bed, or can I work? -> work
B work  3 Stay at home and rest until {day}. | You should not work until {day}. -> rest
A rest  4 <ok>, I'll do what you say, doctor. | <ok>, I'll try to do that at home. -> noted
A rest  4s <sorry>, I can't do that, I have to work. | <sorry>, I can't promise that. -> noted2
B noted2 1a Then it will only get worse, believe me! | That would be a big mistake! -> hub close
A hub   3 Could you write me a note for my boss? | Can I have a note for work, please? -> note
B note  4 <sure>, I'll write it for you now. | <sure>, I'll write you a note until {day}. -> hub close
A close 2 When should I come back to see you? | Do I have to come again next week? -> again
B again 3 Come back on {day2} at {time}. | Please come again on {day2} at {time}. -> again
A again 4 <ok>, I'll come on {day2} at {time}. | <ok>, {day2} at {time}, I'll be here. -> well end
A again 4 <sorry>, I can't come on {day2}. | <sorry>, I can't, I work on {day2}. -> other
B other 3 Then call me on {day2}, please. | Then please call us next week. -> obey
B well  1h Good. Get well soon! | See you on {day2}. Get well soon! -> thanks end

== directions
place place2 = museum; station; library; post office; market; old church; theater
street = Green Street; King Street; Mill Road; Lake Road
mark = bank; bridge; school; bakery; park
side = left; right
A start 2 Excuse me, where is the {place}? | Excuse me, how do I get to the {place}? -> way
B way   3 Go straight on and turn {side} at the {mark}. | Walk down {street} and turn {side} at the {mark}. -> told
B way   1 It's on {street}, near the {mark}. | The {place} is on {street}. -> hub
A told  4 <ok>, I'll turn {side} there. | <ok>, I'll go as far as the {mark}. -> told
A told  2 And what do I do then? | And where do I go from the {mark}? -> told
B told  1 You'll see the {place} on the {side}. | The {place} is on the {side} side. -> hub
A hub   2 How long does it take to walk there? | How far is the {place} from here? -> long
B long  1 It takes about {mins} minutes to walk there. | It's about {mins} minutes on foot. -> tired hub close
A tired 1s {mins} minutes is too long for me. | I'm too tired to walk that far. -> tired
B tired 3 Then you should take a taxi to the {place}. | Take a taxi from the {mark}, it isn't expensive. -> taxi
A taxi  4 <ok>, I'll look for a taxi. | <no>, I'll walk to the {place} after all. -> fine
B fine  1 Good, I'm sure you'll be there in time. | Good, you'll find the {place}. -> hub close
A hub   2 Is there a bus to the {place}? | Which bus goes to the {place}? -> bus
B bus   1 Yes, bus {few} stops at the {mark}. | Bus {few} goes to the {place}. -> hub close
A hub   3 Could you show me on the map? | Can you show me the way on my phone? -> map
B map   4 <sure>, I'll show you. Here is {street}. | <sorry>, I can't see it without my glasses. -> hub close
A hub   1 I also want to see the {place2}. | After that I'm going to the {place2}. -> also
B also  1 The {place2} is just behind the {mark}. | The {place2} is closed today. -> hub close
B also  3 Visit the {place2} first, it closes early. | You should see the {place2} first. -> also2
A also2 4 <ok>, I'll go to the {place2} first. | <ok>, first the {place2} then. -> fine
A close 2 So the {place} is on {street}? | So it's near the {mark}? -> right
B right 1 Yes, that's right, you can't miss it. | Yes, the {place} is easy to find. -> thanks
B right 3 Yes, and ask again at the {mark}. | Yes, just look for the {mark}. -> obey

== book
topic topic2 = history; cooking; travel; music; space; gardens; trains
place = library; station; school; cafe
A start 2 What are you reading there, {name}? | Hi {name}, what's that book you are reading? -> what
A start 2 Hi {name}, do you like that book about {topic}? | {name}, how is the book about {topic}? -> good
B what  1 It's a new book about {topic}. | A friend gave me this book about {topic}. -> good
A good  2 Is it a good book? | Do you like it so far? -> good
B good  1h Yes, I love it, it's so funny. | It's great, I can't stop reading. -> hub lend
B good  1s Not really, it's much too long for me. | I find it a little boring, to be honest. -> hub lend
A good  1h I love books about {topic}! | I've always liked to read about {topic}. -> love
B love  3 Then you should read this one as well. | Then read it when I'm done with it. -> lend
B love  2 Have you read others about {topic}? | Since when do you like {topic}? -> others
A others 1 Only one, at school. | I read one last summer. -> offer
B offer 4h Then I'll lend it to you. | I'll give it to you when I'm done. -> hub care
A lend  3 Could you lend it to me when you're done? | Can I borrow it for a few days? -> lend
B lend  4 <ok>, you can have it on {day}. | <ok>, I'll bring it on {day}. -> hub care
B lend  4s <sorry>, I can't, I promised it to my sister. | <sorry>, I can't, I still need it. -> pity
A pity  1s What a pity, I wanted to read about {topic}. | Oh, that's too bad, it looks so good. -> pity
B pity  3 Take my book about {topic2} instead. | How about a book about {topic2}? -> other
A other 4h <ok>, I'll take the one about {topic2}. | <ok>, I'll read about {topic2} then. -> back
A care  1h That's very kind of you, {name}. | You're a good friend, {name}. -> back
B back  2 How long will you need? | When will you give it back? -> need
B back  3 Be careful with it, and bring it back on {day2}. | Please bring it back on {day2}. -> careful
A need  1 I need about {few} days. | In about {few} days, I think. -> back end
A careful 4 <ok>, I'll be careful. | <ok>, I'll bring it back on {day2}. -> glad end
B glad  1h Great, I hope you like it as much as I do. | Good, you'll enjoy every page of it. -> hub close end
A hub   2 Who wrote the book about {topic}? | Do you know the name of the writer? -> writer
B writer 1 A young woman from London. | Somebody I had never heard of. -> hub close
A hub   3 Don't tell me the end, please. | Please don't tell me what happens. -> spoil
B spoil 4 <ok>, I won't say a word. | I promise, I'll be quiet. -> hub close
A close 3 Let's meet at the {place} on {day}. | Can we meet at the {place} on {day}? -> meet
B meet  2 At what time should I be there? | What time is good for you on {day}? -> meet
A meet  1 It's best at {time}, I think. | I'm free on {day} at {time}. -> meet
B meet  4 <ok>, I'll be at the {place} at {time}. | <ok>, {day} at {time} then. -> bye end

== weekend
plan plan2 = go hiking; go swimming; go dancing; see a film; visit the museum; play tennis; have a picnic
place = station; park; bus stop; bridge
bring = some water; a map; sandwiches; an umbrella; my camera
A start 2 Hi {name}, what are you doing on {day}? | {name}, do you have plans for {day}? -> free
B free  1 I have no plans for {day} so far. | Nothing special, I'm free on {day}. -> idea
B free  2 I have no plans yet, why do you ask? | Not much, what are you doing on {day}? -> idea
A idea  3 Why don't we {plan} on {day}? | Let's {plan} together on {day}. -> idea
B idea  4h <ok>, let's {plan} on {day}. | <ok>, I'd love that, I'll come along on {day}. -> hub
B idea  4s <sorry>, I can't, my leg still hurts. | <sorry>, I won't come, I'm too tired for that. -> other
A other 3 Then let's {plan2} instead. | How about we {plan2} instead? -> other plan=plan2
B other 4h <ok>, let's {plan} on {day} then. | <ok>, I'll be glad to {plan}. -> hub
A hub   2 Who else could we ask to come with us? | Do you know who else is free on {day}? -> who
B who   3 Let's ask my cousin {name2}, too. | Ask {name2} to come, that would be fun. -> who
A who   4 <ok>, I'll call {name2} tonight. | <ok>, I'll write {name2} a message. -> need
A hub   2 Is {day2} better for you? | Would {day2} be better for you? -> day
B day   1 Yes, {day2} is better. | Yes, I have to work on {day}. -> hub close day=day2
B day   1 No, {day} is better for me. | No, I'm busy on {day2}. -> hub close
A hub   1f I'm worried about the weather. | They say it may rain on {day}. -> rain
B rain  1 I heard that it will be sunny on {day}. | The radio said it will be warm and dry. -> hub close
B rain  3 Then let's stay in and play cards. | Let's meet at my house if it rains. -> rain
A rain  4 <ok>, let's do that then. | <ok>, that's what we'll do. -> need
A hub   3 Please bring {bring} for us. | Could you bring {bring} on {day}? -> bring !bring
B bring 4 <ok>, I'll bring {bring} on {day}. | <sorry>, I can't bring that, I don't have any. -> hub close
B need  2 What should I bring on {day}? | Do we need anything special for that? -> need
B need  1h This will be a lot of fun! | I'm really looking forward to it! -> hub close
A need  1 We only need {bring}, I think. | It would be good to have {bring}. -> bring !bring
A close 3 Let's meet at the {place} at {time}. | Then meet me at the {place} at {time}. -> meet
A close 2 When should we meet on {day}? | Where and when do we meet on {day}? -> where
B where 3 Let's meet at the {place} at {time}. | Meet me at {time} at the {place}. -> where
A where 4 <ok>, I'll be at the {place} at {time}. | <ok>, I'll be there at {time}. -> bye end
B meet  4 <ok>, I'll be at the {place} at {time}. | <ok>, I'll be there at {time}. -> bye end
B meet  4 <sorry>, I can't be there at {time}. | <sorry>, I won't make it at {time}. -> late
A late  3 Then let's meet at {time2}. | How about {time2} then? -> meet time=time2

== interview
job = cook; driver; teacher; nurse; waiter; gardener
skill = patient; friendly; careful; polite; quick
B start 3 Hello {name}, please tell me about yourself. | Have a seat, {name}, and tell me about your work. -> about
A about 1 I've been working as a {job} for {few} years. | I have worked as a {job} for {few} years. -> ask turn
B ask   2 Why did you leave your last job? | Why do you want to leave your job? -> why
A why   1 I want to learn something new. | It was too far from my home. -> ask turn
A why   1a They never paid me on time. | My boss was always angry. -> ask turn
B ask   2 What are you good at? | What would your friends say about you? -> good
A good  1 I'm always very {skill} at work. | People say that I'm {skill}. -> ask turn
B turn  1 We are looking for a {job} like you. | We need a new {job} very soon. -> hub
B turn  3 Please tell me what you'd like to know. | Now ask me anything you like. -> hub
A hub   2 How much do you pay an hour? | And what is the pay for a {job}? -> pay
B pay   1 We pay {mins} dollars an hour. | It's {mins} dollars an hour. -> low hub close
A low   3 Could you pay a little more? | Can I get a bit more than {mins} dollars? -> more
B more  4 <sorry>, I can't pay more than {mins} dollars. | <ok>, I'll talk to my boss about it. -> hub close
A hub   3 Could you show me the place? | Can I see where I'd work? -> show
B show  4 <sure>, I'll show you around later. | <sure>, let me show you now. -> hub close
A hub   1f I must say I'm a little nervous. | This is my first interview in years. -> calm
B calm  1h You're doing very well. | You'll be a good {job}, I think. -> hub close
A close 2 When could I start to work here? | And when would the job begin? -> begin
B begin 3 Come here on {day} at {time}. | Please be here on {day} at {time}. -> begin
A begin 4h <ok>, I'll be here on {day} at {time}. | <ok>, I'll come on {day}. -> bye end
A begin 4 <sorry>, I can't start on {day}. | <sorry>, I can't come on {day}. -> then
B then  3 Then come on {day2}. | How about {day2} then? -> then
A then  4h <ok>, I'll start on {day2}. | <ok>, I'll be here on {day2}. -> bye end

== phone repair
thing = phone; computer; tablet; watch; camera
fault = doesn't start; is very slow; makes a strange noise; turns off all the time
part = battery; screen; button
B start 2 <hello>, what's the problem? | <hello>, what's broken? -> say
A say   1 My {thing} {fault}. | My new {thing} {fault}. -> ask
A say   3 Could you look at my {thing}? It {fault}. | Please look at my {thing}. It {fault}. -> look
B look  4 <sure>, I'll look at it now. | <sure>, let me see it. -> hub
B ask   2 Did you drop it? | Did it fall down? -> drop
B ask   3 Please give me the {thing}. | Let's have a look at it. -> give
A drop  1s Yes, it fell on the floor yesterday. | No, but I left it out in the rain. -> found
A give  1 Here you are, it's quite new. | Here's the {thing}, please be careful. -> found
B found 1 I can see that the {part} is broken. | I see, it needs a new {part}. -> part hub
B found 3 You should get a new {part}. | Let me have it here for a day, please. -> new
A new   4 <ok>, I'll do that. | <ok>, I'll leave it here. -> calm
A part  1u Oh no, the {part}! | What, it's only a year old! -> calm
B calm  4 I'll change the {part} for you. | I'll fix it, that's my job. -> hub close
A hub   2 How much will the repair cost? | What does a new {part} cost? -> price
B price 1 That will be {price} dollars with the {part}. | It costs {price} dollars to repair it. -> dear hub close
A dear  1u {price} dollars is too much! | I didn't expect to pay {price} dollars! -> dear
A dear  3 Could you do it for {cheap} dollars? | Can you do it for less than {price} dollars? -> dear
B dear  4 <ok>, I'll do it for {cheap} dollars. | <sorry>, I can't do it for less. -> hub close
A hub   2 When will my {thing} be ready? | How long will you need for it? -> ready
B ready 1 Your {thing} will be ready on {day}. | I need until {day}, I'm afraid. -> soon hub close
A soon  3 Could you do it before {day}? | Please try to do it sooner. -> soon
B soon  4 <sorry>, I can't do it before {day}. | <ok>, I'll try to hurry up. -> hub close
A hub   1f All my family pictures are on that {thing}. | I'm afraid I'll lose my pictures. -> save
B save  4 I'll save your pictures first. | I'll be very careful with them. -> hub close
A close 1 My name is {name}, by the way. | The name is {name}. -> call
B call  3 Come back on {day}, {name}. | Please pick it up on {day}, {name}. -> call
B call  4 <ok> {name}, I'll call you on {day}. | I'll send you a message on {day}, {name}. -> thanks end
A call  4 <ok>, I'll be here on {day}. | <ok>, I'll come on {day}. -> bye end

== cooking
dish = soup; pizza; chicken; fish; pasta
food food2 = tomatoes; onions; carrots; potatoes; mushrooms; peppers
drink = juice; wine; water; beer
A start 2 What shall we cook tonight? | What do you want for dinner? -> dish
B dish  3 Let's make {dish} with {food}. | How about {dish} with {food}? -> dish
B dish  1 I'm in the mood for {dish} tonight. | I'd love some good {dish} again. -> with
A dish  4h <ok>, let's make {dish}. | <ok>, I'll help you with the {dish}. -> hub
A dish  4d <sorry>, I can't eat {food}. | <sorry>, I won't eat {food}, I hate them. -> swap
B swap  3 Then let's take {food2} instead. | How about {food2} instead? -> swap food=food2
A swap  4 <ok>, let's use {food}. | <ok>, {food} then. -> hub
A with  3 Let's make it with {food}. | Then let's add some {food}. -> with
B with  4 <ok>, {dish} with {food} then. | <ok>, I'll get the {food}. -> hub close
B hub   2 How many {food} do we need? | How many {food} shall I wash? -> many
A many  1 I think we need {few} {food}. | {few} {food} should be enough for us. -> many
B many  4 <ok>, I'll wash {few} {food}. | <ok>, {few} {food} coming up. -> hub close
B hub   3 Please cut the {food} for me. | Could you cut the {food}? -> cut
A cut   4 <ok>, I'll cut the {food}. | <sorry>, I can't find a good knife. -> hub
B hub   1 The pan is already hot. | The water for the {dish} is hot now. -> hot
A hot   3 Put the {food} in first, then the salt. | Then add the {food} and wait a bit. -> hot
B hot   4 <ok>, I'll put the {food} in. | <ok>, I'll add them now. -> hub close
A hub   2 How long does the {dish} take? | When will the {dish} be ready? -> long
B long  1 It takes about {mins} minutes. | The {dish} needs {mins} minutes more. -> hub close
A hub   3 Please try the {dish}. | Could you try a little of the {dish}? -> taste
B taste 4 <ok>, I'll try it. It's very good! | <ok>, let me see. It needs more salt. -> hub close
A close 2 What shall we drink with the {dish}? | Do we have something cold to drink? -> drink
A close 3 Please set the table for dinner. | Could you set the table for two? -> set
B set   4 <ok>, I'll set the table. | <ok>, I'll get the plates. -> smell
B drink 3 Let's drink {drink} with it. | How about a glass of {drink}? -> drink
B drink 1 There's {drink} in the fridge. | We still have some {drink}. -> smell
A drink 4 <ok>, I'll get the {drink}. | <ok>, I'll open the {drink}. -> ready
A smell 1h Mmm, the {dish} smells so good! | I'm so hungry, this looks great! -> ready
B ready 1h The {dish} is ready, enjoy! | Dinner is ready, enjoy your {dish}! -> end
"""


class Line(NamedTuple):
    """One thing that a speaker can say: a row of a situation."""

    state: str
    act: int  # 1..4
    emotion: int  # 0..6
    texts: list[str]  # the ways of saying it, with {slots} and <phrases>
    next_states: list[str]  # of the other speaker
    assign: list[tuple[str, str]]  # (slot, the slot whose value it takes)
    tag: str  # lines of one tag exclude each other


class Situation(NamedTuple):
    """A parsed table: what a dialogue is drawn from."""

    slots: list[tuple[list[str], list[str]]]  # (names, values), each still with its "/"
    lines: dict[tuple[str, str], list[Line]]  # by (speaker, state); the first key opens the dialogue


OTHER = {"A": "B", "B": "A"}
LINE = re.compile(r"([AB*]) (\w+) +([1-4])([adfhsu]?) (.+) -> ([\w ]+?)(?: (\w+)=(\w+))?(?: !(\w+))?")


def parse_situation(text: str) -> Situation:
    """Read a situation's table (the notation is in the module's docstring).

    Raises ValueError for a row that is not understood and for an arrow to a state where the other speaker has no line.
    """
    slots, lines = [], {}
    for row in filter(None, text.splitlines() + COMMON.splitlines()):
        if match := LINE.fullmatch(row):
            who, state, act, mood, texts, next_states, slot, source, tag = match.groups()
            for speaker in "AB" if who == "*" else who:
                assign, tag = [(slot, source)] if slot else [], tag or row
                line = Line(state, int(act), EMOTIONS[mood], texts.split(" | "), next_states.split(), assign, tag)
                lines.setdefault((speaker, state), []).append(line)
        elif " = " in row:
            names, values = row.split(" = ")
            slots.append((names.split(), values.split("; ")))
        else:
            raise ValueError(f"this row is neither a slot nor a line of a situation: {row!r}")
    for (speaker, _), group in lines.items():
        for state in {state for line in group for state in line.next_states} - {"end"}:
            if (OTHER[speaker], state) not in lines:
                raise ValueError(f"{OTHER[speaker]} has no line in state {state!r}, to which a line of {speaker} leads")
    return Situation(slots, lines)


@functools.cache
def parsed_situations() -> dict[str, Situation]:
    """The SITUATIONS by name."""
    tables = (table.split("\n", 1) for table in SITUATIONS.strip().removeprefix("== ").split("\n== "))
    return {name: parse_situation(text) for name, text in tables}


def _pick(rng: random.Random, options: list):
    # Of random.Random only random() is promised to give the same numbers in every Python version; choice() is not.
    return options[int(rng.random() * len(options))]


def _draw_slots(rng: random.Random, situation: Situation) -> dict[str, str]:
    """One value for each slot; slots of one row get different values."""
    drawn = {}
    for names, values in situation.slots:
        left = list(values)
        for name in names:
            value = left.pop(int(rng.random() * len(left)))
            drawn.update(zip(name.split("/"), value.split("/"), strict=True))
    return drawn


def _draw_walk(rng: random.Random, situation: Situation) -> list[Line] | None:
    """The lines of one dialogue in their order, or None where the walk got stuck or came out too short or too long."""
    walk, used = [], set()
    length = _pick(rng, [6, 7, 8, 8, 9, 9, 10, 11])  # what to steer for; a goodbye is about four utterances long
    speaker, state = next(iter(situation.lines))
    states = [state]
    while "end" not in states or (len(states) > 1 and len(walk) < length):
        said_next = [line for state in states if state != "end" for line in situation.lines[speaker, state]]
        pool = [line for line in said_next if line.tag not in used]
        late = len(walk) + 4 >= length and rng.random() < 0.8  # mostly: the last topic may have its say
        wanted = [line for line in pool if (line.state == "close") == late]
        if not pool or len(walk) == MAX_TURNS:
            return None
        line = _pick(rng, wanted or pool)
        walk.append(line)
        used.add(line.tag)
        speaker, states = OTHER[speaker], line.next_states
    return walk if len(walk) >= MIN_TURNS else None


def _say(rng: random.Random, template: str, slots: dict[str, str]) -> str:
    """Fill the <phrases> and {slots} in, then mend a/an and the capital letters."""

    def fill(match: re.Match) -> str:
        return slots[match[1]] if match[1] else _pick(rng, PHRASES[match[2]].split("; "))

    text = re.sub(r"\{(\w+)\}|<(\w+)>", fill, template)
    text = re.sub(r"\b([Aa]) (?=[aeiou])(?!one)", r"\1n ", text)
    return re.sub(r"(?:^|[.?!] )[a-z]", lambda match: match[0].upper(), text)


def _draw_dialogue(rng: random.Random, situation: Situation) -> dict[str, list]:
    while (walk := _draw_walk(rng, situation)) is None:
        pass
    slots, dialog = _draw_slots(rng, situation), []
    for line in walk:
        dialog.append(_say(rng, _pick(rng, line.texts), slots))
        for slot, source in line.assign:
            slots[slot] = slots[source]
    return {"dialog": dialog, "act": [line.act for line in walk], "emotion": [line.emotion for line in walk]}


def generate_corpus(seed: int = 0) -> dict[str, list[dict]]:
    """Write the corpus: SPLIT_SIZES dialogues per split, no two of them with the same text, in any split.

    A row is {"dialog": list[str], "act": list[int], "emotion": list[int]}, of MIN_TURNS to MAX_TURNS entries each, A
    and B taking turns. The same seed gives the same corpus on every machine.
    """
    rng = random.Random(seed)
    situations = list(parsed_situations().values())
    rows, seen = [], set()
    while len(rows) < sum(SPLIT_SIZES.values()):
        row = _draw_dialogue(rng, situations[len(rows) % len(situations)])  # in turn: each split has its share of all
        text = "\n".join(row["dialog"])
        if text not in seen:
            seen.add(text)
            rows.append(row)
    corpus = {}
    for split, size in SPLIT_SIZES.items():
        corpus[split], rows = rows[:size], rows[size:]
    return corpus


def main() -> None:
    """Print a few dialogues for a reader."""
    parser = argparse.ArgumentParser(description="Print dialogues of the embedded corpus.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus")
    parser.add_argument("--split", choices=list(SPLIT_SIZES), default="train", help="which part of it")
    parser.add_argument("--limit", type=int, default=5, help="how many dialogues")
    args = parser.parse_args()
    for number, row in enumerate(generate_corpus(args.seed)[args.split][: max(args.limit, 0)]):
        print(f"--- {args.split} {number}")
        for text, act in zip(row["dialog"], row["act"], strict=True):
            print(f"{ACTS[act]:>10}  {text}")


if __name__ == "__main__":
    main()
