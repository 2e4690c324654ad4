import asyncio, msgspec, time
from tests.fault.actors import *
from tests.fault.test_consumer_ends import *
async def test_x():
    limits = {"silence": 0.5}
    async with actors(Options("http", 2 * LARGE, timeouts=limits), Options("http", LARGE)) as (producer, consumer):
        ref = await producer.ready_ref(LARGE, 1)
        await consumer.ask("pull", ref=encoded(ref), request="r1", timeout_s=60)
        await consumer.event("placing")
        await consumer.stop()
        for i in range(8):
            print(await producer.ask("state"), producer.saw("idle"))
            await asyncio.sleep(0.2)
        consumer.resume()
        await asyncio.sleep(0.3)
        print(consumer._events)
