"""The words that the small model's tokenizer knows as single pieces."""

WORDS = """
a about above across after again against all almost alone along already also although always among
an and animal another answer any apple are area around arrow as at autumn away baby back bad bag
ball banana bank basket beach bear beautiful because bed bee before began behind bell below bench
beside best better between bicycle big bird black blue board boat body book both bottle bottom bowl
box boy branch bread breakfast bridge bright brown brush building bus but button by cake call
camera can candle car card carpet carry castle cat center chair change child children church circle
city clean clear clock close cloth cloud clouds coat coffee cold color colour come compare corner
could country cow cross cup curtain dark day deep deer describe desk different difference dog door
down draw dress drink drive dry duck during each ear early earth east easy eat edge egg eight
elephant empty end engine evening every example eye face fall family far farm fast father feather
feet fence few field fine finger fire first fish five flag flat floor flower fly follow food foot
for forest fork form found four fox frame fresh friend frog from front fruit full game garden gate
girl give glass go gold good grass gray great green ground group grow hair half hall hand happy
hard has hat have he head heart heavy help her here high hill him his hold hole home horse hot hour
house how huge human hundred ice idea if image in inside into iron is island it its jacket jar join
joy jump just keep key kind king kitchen kite knife know lake lamp land large last late laugh leaf
lean learn leave left leg lemon length less letter level light like line lion list little live long
look lost loud love low lunch machine main make man many map mark market mask match may me meadow
mean middle milk mind mirror money monkey moon more morning most mother mountain mouse mouth move
much music must my name narrow near neck need nest net never new next night nine no noise noon
north nose not note nothing now number object ocean of off office often old on once one only open
or orange other our out outside over own page paint pair paper park part past path peace pen pencil
people perhaps person picture pictures piece pig pink place plain plane plant plate play please
pocket point pond pool poor porch pot power present pretty pull purple push put question quick
quiet quite rabbit rain rainbow raise reach read ready real red rest rice rich ride right ring rise
river road rock roof room root rope rose round row run sad said sail salt same sand say sea season
seat second see seed seem send set seven shade shadow shape sharp she sheep shelf shell ship shirt
shoe shop short should show side sign silver simple since sing sister sit six size skin sky sleep
slow small smile smoke smooth snow so soft some something song soon sound soup south space spoon
spring square stairs stand star start station stay step still stone stop store storm story straight
street strong such sugar summer sun sweet swim table take tale talk tall taste tea tell ten tent
than that the their them then there these they thick thin thing think third this those though three
through ticket time tiny to today together top touch toward tower town toy track train tree trees
triangle truck true try turn twelve twenty two under until up upon us use valley very view village
voice wait walk wall want warm was wash watch water wave way we wear weather week well went were
west wet what wheel when where which while white who whole why wide wild will wind window wing
winter wish with without woman wonder wood wooden word work world would write year yellow yes
yesterday yet you young your zebra zero
"""
